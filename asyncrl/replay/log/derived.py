"""A new log made from an old one: what another run takes over to go on from one of its checkpoints, under other settings.

    old = OldLog(Path("runs/arithmetic/replay"), update=50)
    old.require_rows([0, 50, 100])
    old.write(Path("runs/fork/replay"), "runs/arithmetic", LogChanges(min_ess=0.5))

The old log is only read, also while its run goes on; closed segments of rows are linked, not copied. The new one says of every
training group what the old one does, but for what came of it after `update`: the batches that were trained then are waiting
again, in their order, as after a restore, also where the old run keeps no checkpoint of so long ago. What did not survive a
restore is left out; so are held-out responses, whose results up to `update` stay.
"""

import math
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
from msgspec import Struct
from msgspec.structs import replace

import asyncrl.replay.log.events as ev
from asyncrl.errors import DataError
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.log.history import NumberedRows
from asyncrl.replay.log.reader import Listed, ReplayReader, at_rest
from asyncrl.replay.log.rows import ROWS, with_token_rewards
from asyncrl.replay.log.segments import Segments
from asyncrl.rundir import link_or_copy
from asyncrl.types import Score, Version

Which = tuple[int, int]  # group, rollout
Timed = tuple[ev.Event, float]  # when it was written, in seconds since the epoch
_OF_GROUP = ev.GroupReissued | ev.RolloutSubmitted | ev.RolloutScored | ev.GroupSettled | ev.GroupExcused
_EVENTS_PER_RECORD, _SEGMENT_BYTES = 4096, 16 << 20


class LogChanges(Struct, frozen=True, kw_only=True):
    """In what the new log differs from the old one.

    scores: other verdicts, by (group, rollout); a group that is in no batch and has one is not used.
    """

    min_ess: float = 0.0  # see `LogForked`
    live: bool = False  # nothing that waits is used, no batch either
    scores: Mapping[Which, Score] = {}
    rows: Mapping[Which, int] = {}  # where the rollouts stand once more that earn something by token under these scores

    def rescored(self, e: ev.RolloutScored) -> ev.RolloutScored:
        """The verdict on a rollout."""
        which = e.group, e.rollout
        new = self.scores.get(which)
        if new is None or new.attempt != e.attempt:
            return e
        told = {name: getattr(new, name) for name in ("status", "reward", "parts", "error", "said")}
        return replace(e, **told, row=self.rows.get(which), token_sum=math.fsum(new.token_rewards or ()))


class Derivation:
    """The events of a log, seen from `update`. each: reads them, as often as it is called.

    Memory: as of a store whose run keeps no checkpoint after `update`.
    """

    def __init__(self, each: Callable[[], Iterable[Timed]], update: int) -> None:
        self._each = each
        self._update = update
        self._made: dict[int, ev.BatchCommitted] = {}  # by update, those that survived and are not undone
        self.segments: dict[int, ev.SegmentClosed] = {}  # of rows, by number
        ledger = Ledger(max_lag=0)
        for event, _ in each():
            # Where the old run forgot its batches, this one remembers those after `update`.
            kept = ev.CheckpointRetained(min(event.oldest, update)) if isinstance(event, ev.CheckpointRetained) else event
            ledger.apply(kept)
            ledger.records.clear()
            self._note(event)
        undone = {u - 1: tuple(g.id for g in commit.groups) for u, commit in ledger.commits.items()}
        leased = {lease.update: lease.groups for lease in ledger.leases.values() if lease.replayed}
        later = undone | leased | ledger.reopened
        self.batches = [groups for at, groups in sorted(later.items()) if at >= update]  # that were trained after `update`
        trained = ledger.groups | {g.id: g for commit in ledger.commits.values() for g in commit.groups}
        self.rows = [[r.row for g in batch for r in trained[g].ok()] for batch in self.batches]  # of the log, that they need
        self.lineage = ledger.lineage()
        self._incarnation = ledger.incarnation

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.BatchCommitted):
            self._made[event.version.update] = event
        elif isinstance(event, ev.LearnerFenced):
            self._made = {update: commit for update, commit in self._made.items() if update <= event.committed}
        elif isinstance(event, ev.SegmentClosed) and event.stream == "rows":
            self.segments[event.number] = event

    def events(self, source: str, changes: LogChanges = LogChanges()) -> Iterator[Timed]:
        """The new log's. source: the old run, for who reads it."""
        waiting: set[int] = set()  # groups that are reserved and not settled, as the new log has it so far
        later = set() if changes.live else {group for batch in self.batches for group in batch}
        before = [commit for update, commit in self._made.items() if update <= self._update]
        leases, trained = {commit.lease for commit in before}, later.union(*(commit.groups for commit in before))
        touched, time = set[int](), 0.0
        for old, time in self._each():
            event = self._taken_over(old, waiting, trained, leases)
            if isinstance(event, ev.RolloutScored) and (new := changes.rescored(event)) is not event:
                touched.add(event.group)
                event = new
            if isinstance(event, ev.GroupReserved):
                waiting.add(event.group)
            elif isinstance(event, ev.GroupSettled | ev.GroupsUnused | ev.BatchCommitted):
                waiting.difference_update(event.concerned() or ())
            if event is not None:
                yield event, time
        if unused := waiting - later if changes.live else (waiting - later) & touched:
            yield ev.GroupsUnused(tuple(sorted(unused))), time
        batches = () if changes.live else tuple(self.batches)
        yield ev.LogForked(source, self._update, self._incarnation, batches, changes.min_ess), time

    def _taken_over(self, e: ev.Event, waiting: set[int], trained: set[int], leases: set[int]) -> ev.Event | None:
        """What the new log says in the place of an event; None: nothing.

        trained: groups of batches that survived, or come again. leases: of the batches up to `update`.
        """
        if isinstance(e, ev.GroupReserved):
            return e if e.purpose == "train" else None
        if isinstance(e, _OF_GROUP):
            return e if e.group in waiting else None
        if isinstance(e, ev.HolderDied | ev.GroupsUnused | ev.Ended):
            concerned = waiting - trained if isinstance(e, ev.Ended) else waiting.intersection(e.groups)
            groups = tuple(sorted(concerned))
            return (
                None if not groups else replace(e, groups=groups) if isinstance(e, ev.HolderDied) else ev.GroupsUnused(groups)
            )
        if isinstance(e, ev.BatchLeased):
            return replace(e, replayed=False) if e.lease in leases else None
        if isinstance(e, ev.BatchCommitted):
            return e if e.lease in leases else None
        if isinstance(e, ev.LearnerFenced):
            return e if e.committed <= self._update else None
        if isinstance(e, ev.Evaluated):
            return e if self._survived(e.result.version) else None
        return e if isinstance(e, ev.SegmentDropped | ev.SegmentClosed) and e.stream == "rows" else None

    def _survived(self, version: Version) -> bool:
        """Whether weights of this version are among those that led to the checkpoint."""
        commit = self._made.get(version.update)
        return version.update <= self._update and (not version.update or (commit is not None and commit.version == version))


class OldLog:
    """The log in `folder` as it stood when this was made, seen from a checkpoint. derivation: what is taken over of it.

    end: how many of its events are read; None: all.
    """

    def __init__(self, folder: Path, update: int, end: int | None = None) -> None:
        self._folder = folder
        self._update = update
        self._events = ReplayReader(folder).events().select(["time", "payload"]).slice(0, end)
        self.derivation = Derivation(self._each, update)

    def require_rows(self, checkpoints: Sequence[int]) -> None:
        """Raises `DataError` if rows of the batches are deleted. checkpoints: updates of those that there are."""
        rows, needed = NumberedRows(self._folder), self.derivation.rows
        rows.known = self.derivation.segments
        gone = bisect_left(range(len(needed)), True, key=lambda place: rows.hold(list(chain.from_iterable(needed[place:]))))
        if gone:
            oldest = self._update + gone
            left = ", ".join(str(update) for update in checkpoints if update >= oldest) or "none is there"
            raise DataError(
                f"{self._folder}: rollouts of update {oldest} are deleted (store.keep_bytes): batches can be had again from "
                f"update {oldest} on; checkpoints from there: {left}"
            )

    def write(self, into: Path, source: str, changes: LogChanges = LogChanges()) -> None:
        """Makes the new log in the folder `into`, which is not there yet."""
        into.mkdir(parents=True)
        at_rest(self._folder, "rows", lambda closed, tails: _take_over(closed, tails, into / "rows"))
        earning = {which: score.token_rewards for which, score in changes.scores.items() if score.token_rewards}
        changes = replace(changes, rows=self._write_again(into, earning)) if earning else changes
        events = Segments(into, "events", ev.EVENTS, {})
        coming = self.derivation.events(source, changes)
        while chunk := list(islice(coming, _EVENTS_PER_RECORD)):
            batch = ev.to_batch([event for event, _ in chunk], events.rows, 0.0)
            times = pa.array([time for _, time in chunk], pa.float64())
            events.append(batch.set_column(1, ev.EVENTS.field("time"), times))
            if events.tail_bytes >= _SEGMENT_BYTES:
                events.close_segment()
        events.close_segment()

    def _write_again(self, into: Path, earning: Mapping[Which, Sequence[float]]) -> dict[Which, int]:
        """Appends these rollouts with what each of their tokens earns; the numbers of their rows."""
        found, submitted = dict[Which, int](), dict[Which, int]()
        for event, _ in self._each():
            if isinstance(event, ev.RolloutSubmitted) and (event.group, event.rollout) in earning:
                submitted[event.group, event.rollout] = event.row
        rows, coming = Segments(into, "rows", ROWS, dict(self.derivation.segments)), iter(submitted)
        rows.close_segment()  # of what was a tail
        while chunk := list(islice(coming, _EVENTS_PER_RECORD)):
            taken = rows.take([submitted[which] for which in chunk], ROWS.names)
            first = rows.append(with_token_rewards(taken, [earning[which] for which in chunk]))
            found |= {which: row for row, which in enumerate(chunk, first)}
        rows.close_segment()
        return found

    def _each(self) -> Iterator[Timed]:
        for batch in self._events.to_batches():
            yield from zip(map(ev.decode, batch["payload"].to_pylist()), batch["time"].to_pylist(), strict=True)


def _take_over(closed: Listed, tails: Listed, into: Path) -> None:
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    for _, path in closed:
        link_or_copy(path, into / path.name)
    for _, path in tails:
        shutil.copyfile(path, into / path.name)
