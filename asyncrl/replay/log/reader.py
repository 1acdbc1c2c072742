"""Reads a run's replay log from outside, while the run goes on or after it: closed segments and open tails.

table = asyncrl.replay.open("runs/arithmetic").rollouts()   # a pyarrow.Table; .to_pandas() where pandas is installed

Closed segments are Parquet files in replay/rows/ and replay/events/, which other tools read by themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import asyncrl.replay.log.events as ev
from asyncrl.errors import DataError
from asyncrl.replay.log.rows import ROWS, ROWS_3
from asyncrl.replay.log.segments import listing, open_closed, readable
from asyncrl.replay.log.tail import read_tail
from asyncrl.replay.log.verdicts import EVENT_COLUMNS, JOINED, KEYS, Verdicts, join_verdicts, only_groups

_ATTEMPTS = 10  # a segment may be closed or deleted between listing and reading

Read = TypeVar("Read")
Made = TypeVar("Made")
Make = Callable[[pa.Table], Made]
Each = Callable[[pa.Table], pa.Table]


class ReplayReader:
    """Every call reads the log again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def events(self, columns: Sequence[str] | None = None, kinds: Sequence[str] | None = None) -> pa.Table:
        """All events in order, typed columns; `payload` is the whole event as msgpack. columns, kinds: only these."""
        names = ev.EVENTS.names if columns is None else list(columns)
        wanted = None if kinds is None else pa.array(kinds, pa.string())

        def some(events: pa.Table) -> pa.Table:
            return (events if wanted is None else events.filter(pc.is_in(events["kind"], wanted))).select(names)

        return pa.concat_tables(self._read("events", ev.EVENTS, list(dict.fromkeys([*names, "kind"])), some))

    def rollouts(
        self, columns: Sequence[str] | None = None, *, groups: Sequence[int] | None = None, each: Each | None = None
    ) -> pa.Table:
        """One line per rollout that counts, baselines included: the row (rows.ROWS), its verdict, and what happened to its
        group (verdicts.JOINED). columns: only these, which reads a fraction where no tokens are among them. groups: only
        theirs.

        each: what to make of the rows of a piece of the log, some MiB, before the next is read, so that not all tokens are held
        at once. It gets the keys and those of the columns that are the rows' own; it may drop some, and append others.
        """
        names = [*ROWS.names, *JOINED.names] if columns is None else list(columns)
        wanted = [*KEYS, *(n for n in names if n in ROWS.names and n not in KEYS)]
        # First the events: the rows that they count are then there.
        events = self._read("events", ev.EVENTS, EVENT_COLUMNS, lambda piece: Verdicts(piece, names, groups))
        rows = pa.concat_tables(self._read("rows", ROWS, wanted, each or _same, groups))
        made = [name for name in rows.column_names if name not in wanted]
        table = join_verdicts(rows, events)
        return table.select([*(name for name in names if name in table.column_names), *made])

    def decoded(self, *kinds: type[ev.Event]) -> Iterator[ev.Event]:
        """All events of these kinds, oldest first; objects are made as they are asked for."""
        names = pa.array([kind.__struct_config__.tag for kind in kinds])

        def chosen(events: pa.Table) -> pa.ChunkedArray:
            return events.filter(pc.is_in(events["kind"], names))["payload"]

        found = self._read("events", ev.EVENTS, ["kind", "payload"], chosen)
        return map(ev.decode, chain.from_iterable(payloads.to_pylist() for payloads in found))

    def pieces(self, stem: Literal["events", "rows"], columns: list[str], make: Make[Made]) -> list[Made]:
        """What is made of these columns of each piece of the log, some MiB, in order, before the next is read; rows that don't
        count are among them. It may be made again, where a piece was deleted meanwhile. Raises as `rollouts`."""
        return self._read(stem, ev.EVENTS if stem == "events" else ROWS, columns, make)

    def _read(
        self, stem: str, schema: pa.Schema, columns: list[str], make: Make[Made], groups: Sequence[int] | None = None
    ) -> list[Made]:
        """What is made of these columns of each piece of all that is there, in order: chunks of segments, tails, then nothing.

        groups: only the rows of these. Raises `DataError`, also for a closed segment whose pages are damaged.
        """
        wanted = pa.schema([schema.field(name) for name in columns])
        schemas = (schema, ROWS_3) if stem == "rows" else (schema,)

        def made(table: pa.Table) -> Made:
            table = as_columns(wanted, table)
            return make(table if groups is None else only_groups(table, groups))

        def read(closed: Listed, tails: Listed) -> list[Made]:
            # Tails first: they are small, and may be gone by the time that a long history is read.
            ends = [pa.Table.from_batches(batches) for _, path in tails if (batches := read_tail(path, *schemas))]
            pieces = chain.from_iterable(_chunks(path, schemas, columns, groups) for _, path in closed)
            return [made(table) for table in chain(pieces, ends, [wanted.empty_table()])]

        return at_rest(self._folder, stem, read)


Listed = list[tuple[int, Path]]  # number and path of each segment of a stream, in order


def at_rest(folder: Path, stem: str, read: Callable[[Listed, Listed], Read]) -> Read:
    """What `read` makes of a stream's closed segments and its tails. It is called again where one was closed or deleted
    meanwhile. Raises `DataError` if that never ends."""
    for _ in range(_ATTEMPTS):
        closed, tails = listing(folder, stem)
        if listing(folder, stem) != (closed, tails):
            continue  # a tail that was closed between two names of a listing could be missed as both
        try:
            return read(closed, tails)
        except FileNotFoundError:
            continue  # closed or deleted meanwhile: list again
    raise DataError(f"{folder} changed {_ATTEMPTS} times while it was read: try again")


def _same(table: pa.Table) -> pa.Table:
    return table


def _chunks(path: Path, schemas: tuple[pa.Schema, ...], columns: list[str], groups: Sequence[int] | None) -> Iterator[pa.Table]:
    """Of a closed segment, one after the other; those that can hold rows of these groups."""
    file = open_closed(path, *schemas)
    with readable(path):
        there = [name for name in columns if name in file.schema_arrow.names]
        for chunk in range(file.num_row_groups):
            if groups is None or _may_hold(file.metadata.row_group(chunk), groups):
                yield file.read_row_group(chunk, there)


def _may_hold(chunk: pq.RowGroupMetaData, groups: Sequence[int]) -> bool:
    (known,) = (c.statistics for c in map(chunk.column, range(chunk.num_columns)) if c.path_in_schema == "group")
    return known is None or not known.has_min_max or any(known.min <= group <= known.max for group in groups)


def as_columns(wanted: pa.Schema, table: pa.Table) -> pa.Table:
    """The wanted columns; null those that an older version did not have."""
    columns = [table.column(f.name) if f.name in table.column_names else pa.nulls(len(table), f.type) for f in wanted]
    return pa.Table.from_arrays(columns, schema=wanted)


def open_run(run_dir: str | Path) -> ReplayReader:
    """The replay log of a run directory. Raises `DataError` if there is none."""
    return ReplayReader(replay_folder(run_dir))


def replay_folder(run_dir: str | Path) -> Path:
    """Where the log of a run directory is. Raises `DataError` if there is none."""
    folder = Path(run_dir) / "replay"
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder: {run_dir} is no run directory of asyncrl; name the folder that holds replay/"
        )
    return folder
