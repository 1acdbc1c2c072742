"""Follows a log that is being written: the rollouts that the newest updates trained. What came is read once: the newest closed
segment and the tail at first, then what follows them. The whole log is read only for groups that were begun before all that
and are trained now: when a run is resumed or forked."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import asyncrl.replay.log.events as ev
from asyncrl.replay.log.reader import Listed, ReplayReader, as_columns, at_rest
from asyncrl.replay.log.rows import ROWS, ROWS_3
from asyncrl.replay.log.segments import open_closed, readable
from asyncrl.replay.log.tail import other_version, whole_messages
from asyncrl.replay.log.verdicts import EVENT_COLUMNS, JOINED, KEYS, Verdicts, join_verdicts, only_groups

HELD_BYTES = 256 << 20  # of rollouts; past them the oldest updates are forgotten
# As `ReplayReader.rollouts` has them, and how many updates before the newest of the table they were trained.
COLUMNS = pa.schema([*ROWS, *JOINED, ("age", pa.int64())])
_OF_UPDATE = ("outcome", "trained_update", "age")  # of all rollouts that it trained
_FATES = (ev.GroupReserved, ev.GroupSettled, ev.GroupsUnused, ev.BatchCommitted, ev.LearnerFenced, ev.Evaluated)


class RecentRollouts:
    """The rollouts of the newest updates of a run's log, as far as it is written. One thread at a time.

    columns: those of COLUMNS that are kept, beside the keys and `trained_update`. updates: so many, the newest that were
    committed; None: all since this was made.
    """

    def __init__(self, folder: Path, columns: Sequence[str], updates: int | None) -> None:
        self._names = [*dict.fromkeys((*KEYS, "trained_update", *columns))]
        self._own = [name for name in self._names if name not in _OF_UPDATE]
        self._updates = updates
        kept = {*KEYS, "purpose", *columns}
        self._new_events = _Following(folder, "events", ev.EVENTS, EVENT_COLUMNS)
        self._new_rows = _Following(folder, "rows", ROWS, [name for name in ROWS.names if name in kept])
        self._events, self._rows = self._new_events.empty, self._new_rows.empty  # of groups that are under way
        self._log = ReplayReader(folder)
        self._begun: set[int] | None = None  # groups that are under way, of which all is followed; None: nothing was read yet
        self._evaluated: set[int] = set()  # groups of the running evaluation
        self._trained: dict[int, pa.Table] = {}  # by update: its rollouts with their verdicts
        self._undone: list[pa.Table] = []  # of updates that a restore undid: to be trained again

    def table(self, update: int) -> pa.Table:
        """What the updates up to this one trained. Reads what has come since the call before. Raises `DataError`."""
        self._follow()
        tables = [COLUMNS.empty_table().select(self._names)]
        for at, table in self._trained.items():
            if at <= update and (self._updates is None or at > update - self._updates):
                for name, value in zip(_OF_UPDATE, ("trained", at, update - at), strict=True):
                    table = table.append_column(name, pa.repeat(pa.scalar(value, COLUMNS.field(name).type), len(table)))
                tables.append(table.select(self._names))
        return pa.concat_tables(tables)

    def _follow(self) -> None:
        events = pa.concat_tables([self._new_events.empty, *self._new_events.read()])  # first: rows are written before them
        self._events = pa.concat_tables([self._events, _of_kinds(events, ev.RolloutSubmitted, ev.RolloutScored)])
        for rows in self._new_rows.read():
            # Copied: what it was read from has tokens, too.
            self._rows = pa.concat_tables([self._rows, rows.take(pc.indices_nonzero(pc.equal(rows["purpose"], "train")))])
        commits, begun, ended = self._take(map(ev.decode, _of_kinds(events, *_FATES)["payload"].to_pylist()))
        self._begun = set() if self._begun is None else self._begun | begun  # at first: their rows may lie in older segments
        first = -1 if self._updates is None else max(commits, default=0) - self._updates
        commits = {update: groups for update, groups in commits.items() if update > first}
        followed = {*self._begun, *(group for table in self._undone for group in table["group"].to_pylist())}
        older = self._read_older({group for groups in commits.values() for group in groups} - followed)
        for update, groups in commits.items():
            self._commit(update, groups, older, self._begun)
        self._bound(first)
        self._begun -= ended
        self._rows, self._events = _without(self._rows, ended), _without(self._events, {*ended, *self._evaluated})

    def _take(self, fates: Iterable[ev.Event]) -> tuple[dict[int, tuple[int, ...]], set[int], set[int]]:
        """The groups of new commits by update, and all groups that were begun, and that ended."""
        commits: dict[int, tuple[int, ...]] = {}
        begun, ended = set[int](), set[int]()
        for event in fates:
            if isinstance(event, ev.GroupReserved):
                (self._evaluated if event.purpose == "eval" else begun).add(event.group)
            elif isinstance(event, ev.Evaluated):
                ended |= self._evaluated
                self._evaluated = set()
            elif isinstance(event, ev.GroupSettled):
                ended.add(event.group)
            elif isinstance(event, ev.GroupsUnused):
                ended.update(event.groups)
            elif isinstance(event, ev.BatchCommitted):
                commits[event.version.update] = event.groups
                ended.update(event.groups)
            elif isinstance(event, ev.LearnerFenced):
                self._undone += [self._trained.pop(update) for update in [*self._trained] if update > event.committed]
                for update in [update for update in commits if update > event.committed]:
                    ended.difference_update(commits.pop(update))
        return commits, begun, ended

    def _read_older(self, groups: set[int]) -> pa.Table:
        return self._log.rollouts(self._own, groups=[*groups]) if groups else COLUMNS.empty_table().select(self._own)

    def _commit(self, update: int, groups: Sequence[int], older: pa.Table, begun: set[int]) -> None:
        followed = [group for group in groups if group in begun]
        made = [
            join_verdicts(only_groups(self._rows, followed), [Verdicts(self._events, self._names, followed)]).select(self._own)
        ]
        made += [only_groups(table, groups) for table in (older, *self._undone)]
        self._undone = [rest for table in self._undone if len(rest := _without(table, groups))]
        self._trained[update] = pa.concat_tables(made).combine_chunks()

    def _bound(self, first: int) -> None:
        for update in [update for update in self._trained if update <= first]:
            del self._trained[update]
        while len(self._trained) > 1 and sum(table.nbytes for table in self._trained.values()) > HELD_BYTES:
            del self._trained[min(self._trained)]


def _of_kinds(events: pa.Table, *kinds: type[ev.Event]) -> pa.Table:
    return events.filter(pc.is_in(events["kind"], pa.array([kind.__struct_config__.tag for kind in kinds])))


def _without(table: pa.Table, groups: Iterable[int]) -> pa.Table:
    """The lines of other groups, in one piece."""
    return table.filter(pc.invert(pc.is_in(table["group"], pa.array(groups, pa.int64())))).combine_chunks()


class _Following:
    """A stream from its newest closed segment on, each row once."""

    def __init__(self, folder: Path, stem: str, schema: pa.Schema, columns: Sequence[str]) -> None:
        self._folder, self._stem = folder, stem
        self._schemas = (schema, ROWS_3) if stem == "rows" else (schema,)
        self._wanted = pa.schema([schema.field(name) for name in columns])
        self._number = -1  # of the segment that is read next, or on
        self._given = self._bytes = 0  # rows of it that were read, and where its tail goes on
        self._found: pa.Schema | None = None  # of its tail
        self.empty = self._wanted.empty_table()

    def read(self) -> list[pa.Table]:
        """The rows that are new."""
        found: list[pa.Table] = []

        def read(closed: Listed, tails: Listed) -> None:
            """Goes on after what was found, where a segment was closed or deleted since it was listed."""
            if self._number < 0:
                self._number = closed[-1][0] if closed else 0
            for number, path in sorted([*closed, *tails]):
                if number < self._number:
                    continue
                if number > self._number:
                    self._number, self._given, self._bytes = number, 0, 0
                table = self._closed(path) if path.suffix == ".parquet" else self._tail(path)
                found.append(as_columns(self._wanted, table))

        at_rest(self._folder, self._stem, read)
        return found

    def _closed(self, path: Path) -> pa.Table:
        file: pq.ParquetFile = open_closed(path, *self._schemas)
        with readable(path):
            table = file.read([name for name in self._wanted.names if name in file.schema_arrow.names])
        given, self._number, self._given, self._bytes = self._given, self._number + 1, 0, 0
        return table.slice(given)

    def _tail(self, path: Path) -> pa.Table:
        with path.open("rb") as file:
            file.seek(self._bytes)
            messages, end = whole_messages(file.read())
        if self._bytes == 0 and messages:
            self._found = pa.ipc.read_schema(messages.pop(0))
            if not any(self._found.equals(known, check_metadata=True) for known in self._schemas):
                raise other_version(path)
        self._bytes += end
        batches = [pa.ipc.read_record_batch(pa.ipc.read_message(message), self._found) for message in messages]
        self._given += sum(batch.num_rows for batch in batches)
        return pa.Table.from_batches(batches, self._found or self._schemas[0])
