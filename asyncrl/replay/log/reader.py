"""Reads a run's replay log from outside, while the run goes on or after it: closed segments and open tails.

table = asyncrl.replay.open("runs/arithmetic").rollouts()   # a pyarrow.Table; .to_pandas() where pandas is installed

Closed segments are Parquet files in replay/rows/ and replay/events/, which other tools read by themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

import asyncrl.replay.log.events as ev
from asyncrl.errors import DataError
from asyncrl.replay.log.rows import ROWS, ROWS_3
from asyncrl.replay.log.segments import listing, open_closed, readable
from asyncrl.replay.log.tail import read_tail

_ATTEMPTS = 10  # a segment may be closed or deleted between listing and reading
Read = TypeVar("Read")
_KEYS = ["group", "rollout", "attempt"]
_JOINED = pa.schema(
    [
        ("status", pa.string()),  # null: not scored yet
        ("reward", pa.float64()),
        ("parts", pa.map_(pa.string(), pa.float64())),
        ("error", pa.string()),
        ("said", pa.map_(pa.string(), pa.string())),  # by judges, by the name of their term
        ("outcome", pa.string()),  # of the group; null: pending
        ("trained_update", pa.int64()),  # null unless trained
        ("submitted_time", pa.float64()),
        ("scored_time", pa.float64()),
    ]
)


class ReplayReader:
    """Every call reads the log again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def events(self) -> pa.Table:
        """All events in order, typed columns; `payload` is the whole event as msgpack."""
        return self._read("events", ev.EVENTS, ev.EVENTS.names)

    def rollouts(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One line per rollout that counts, baselines included: the row (rows.ROWS), its verdict, and what happened to its
        group. columns: only these, which reads a fraction where no tokens are among them."""
        names = [*ROWS.names, *_JOINED.names] if columns is None else list(columns)
        joined = _walk(self._read("events", ev.EVENTS, ["time", "payload"]))  # first: the rows that they count are then there
        rows = self._read("rows", ROWS, [*_KEYS, *(n for n in names if n in ROWS.names and n not in _KEYS)])
        keys = zip(*(rows.column(name).to_pylist() for name in _KEYS), strict=True)
        last = {key: i for i, key in enumerate(keys) if key in joined}  # a later row of a rollout also has its token rewards
        lines = {i: joined[key] for key, i in last.items()}
        # Not `take`, which joins the texts of all of it to one array, and fails where these have more than 2 GiB.
        table = rows.filter(pa.array([i in lines for i in range(len(rows))], pa.bool_()))
        for field in _JOINED:
            table = table.append_column(field, pa.array([lines[i].get(field.name) for i in sorted(lines)], field.type))
        return table.select(names)

    def decoded(self, *kinds: type[ev.Event]) -> Iterator[ev.Event]:
        """All events of these kinds, oldest first; objects are made as they are asked for."""
        events, names = self._read("events", ev.EVENTS, ["kind", "payload"]), [kind.__struct_config__.tag for kind in kinds]
        chosen = events.filter(pc.is_in(events["kind"], pa.array(names)))["payload"]
        return map(ev.decode, chain.from_iterable(chunk.to_pylist() for chunk in chosen.chunks))

    def _read(self, stem: str, schema: pa.Schema, columns: list[str]) -> pa.Table:
        """These columns of all that is there. Raises `DataError`, also for a closed segment whose pages are damaged."""
        wanted = pa.schema([schema.field(name) for name in columns])
        schemas = (schema, ROWS_3) if stem == "rows" else (schema,)

        def read(closed: Listed, tails: Listed) -> pa.Table:
            # Tails first: they are small, and may be gone by the time that a long history is read.
            ends = [pa.Table.from_batches([batch]) for _, path in tails for batch in read_tail(path, *schemas)]
            tables = [_read_closed(path, schemas, columns) for _, path in closed]
            return pa.concat_tables([wanted.empty_table(), *(as_columns(wanted, table) for table in (*tables, *ends))])

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


def _read_closed(path: Path, schemas: tuple[pa.Schema, ...], columns: list[str]) -> pa.Table:
    file = open_closed(path, *schemas)
    with readable(path):
        return file.read([name for name in columns if name in file.schema_arrow.names])


def as_columns(wanted: pa.Schema, table: pa.Table) -> pa.Table:
    """The wanted columns; null those that an older version did not have."""
    columns = [table.column(f.name) if f.name in table.column_names else pa.nulls(len(table), f.type) for f in wanted]
    return pa.Table.from_arrays(columns, schema=wanted)


def _walk(events: pa.Table) -> dict[tuple[int, int, int], dict[str, Any]]:
    """The values of _JOINED by (group, rollout, attempt)."""
    lines: dict[tuple[int, int, int], dict[str, Any]] = {}
    outcomes: dict[int, str] = {}
    trained: dict[int, int] = {}
    reserved: set[int] = set()
    for payload, time in zip(events.column("payload").to_pylist(), events.column("time").to_pylist(), strict=True):
        event = ev.decode(payload)
        if isinstance(event, ev.GroupReserved) and event.purpose == "train":
            reserved.add(event.group)
        elif isinstance(event, ev.RolloutSubmitted):
            lines[event.group, event.rollout, event.attempt] = {"submitted_time": time}
        elif isinstance(event, ev.RolloutScored):
            verdict = {"status": event.status, "reward": event.reward, "parts": list(event.parts.items()), "error": event.error}
            said = list(event.said.items())
            lines[event.group, event.rollout, event.attempt] |= {**verdict, "said": said, "scored_time": time}
        elif isinstance(event, ev.GroupSettled):
            outcomes[event.group] = event.outcome
        elif isinstance(event, ev.BatchCommitted):
            outcomes.update(dict.fromkeys(event.groups, "trained"))
            trained.update(dict.fromkeys(event.groups, event.version.update))
        elif isinstance(event, ev.LearnerFenced):
            for group in [g for g, update in trained.items() if update > event.committed]:
                del trained[group], outcomes[group]
        elif isinstance(event, ev.Ended):
            outcomes.update(dict.fromkeys(reserved - outcomes.keys(), "unused"))
    for (group, _, _), line in lines.items():
        line["outcome"], line["trained_update"] = outcomes.get(group), trained.get(group)
    return lines


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
