"""The log on disk: the source of truth, never rewound. Two streams, rows and events: rows first, then the event that makes
them count. "Acknowledged" means handed to the operating system: it survives any kill of the process."""

import fcntl
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import pyarrow as pa

import asyncrl.replay.log.events as ev
from asyncrl.config import StoreSpec
from asyncrl.errors import DataError, Unavailable
from asyncrl.replay.log.rows import ROWS
from asyncrl.replay.log.segments import Segments


class ReplayLog:
    """Opens or creates the log in `folder` and recovers what a kill left: `history` holds every acknowledged event.

    A tail that was cut is closed into a segment up to the last call whose rows and events are both whole.
    spec.fsync `segment`: closed segments are synced; `call`: every acknowledged call, which also survives a power failure.
    Its owner holds `locked(folder)`. Raises `DataError` naming the file if a closed segment is damaged.
    """

    def __init__(self, folder: Path, spec: StoreSpec = StoreSpec()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._spec = spec
        self._groups: dict[int, frozenset[int]] = {}  # of closed row segments, by number
        self._events = Segments(folder, "events", ev.EVENTS, spec.fsync == "call", {})
        batches = self._read_events(folder)
        closed = [e for batch in batches for e in batch if isinstance(e, ev.SegmentClosed)]
        known = {stream: {e.number: e for e in closed if e.stream == stream} for stream in ("rows", "events")}
        self._rows = Segments(folder, "rows", ROWS, spec.fsync == "call", known["rows"])
        self.history: list[ev.Event] = self._acknowledged(batches)
        self._check_events(known["events"], folder)
        self._recover(known)

    # ----------------------------------------------------------------------------------------- append

    def append_rows(self, batch: pa.RecordBatch) -> int:
        """The number of the first row. The rows don't count until an event names them."""
        return self._rows.append(batch)

    def append_events(self, events: Sequence[ev.Event]) -> None:
        """One call's events, whole or not at all. Closes segments that are full."""
        self._append(events)
        if self._rows.tail_bytes >= self._spec.segment_bytes:
            self._close_rows()
        if self._events.tail_bytes >= self._spec.segment_bytes:
            self._close_events()

    def take(self, rows: Sequence[int], columns: list[str]) -> pa.RecordBatch:
        """Rows by number, in this order."""
        return self._rows.take(rows, columns)

    def truncate(self, wanted: Collection[int]) -> int:
        """Deletes closed row segments that hold no group of `wanted`, unless spec.keep_segments is `all`; how many."""
        if self._spec.keep_segments == "all":
            return 0
        unwanted = [s for s in self._rows.closed if self._groups_of(s).isdisjoint(wanted)]
        for segment in unwanted:
            self._append([ev.SegmentDropped(segment.number)])
            self._rows.drop(segment)
        return len(unwanted)

    def close(self) -> None:
        """Closes the files. The tails stay as they are: the next opening closes them into segments."""
        for stream in (self._rows, self._events):
            stream.sync()
            stream.release()

    # ---------------------------------------------------------------------------------------- recover

    def _read_events(self, folder: Path) -> list[list[ev.Event]]:
        """All events, one list per Arrow batch; in the tail a batch is a call."""
        batches = []
        for segment in self._events.closed:
            where = f"{folder}/events-{segment.number:08d}"
            batches += [_decode(batch, where) for batch in self._events.reader(segment).read_all().to_batches()]
        self._closed_batches = len(batches)
        return batches + [_decode(batch, f"the tail of {folder}/events") for batch in self._events.batches]

    def _acknowledged(self, batches: list[list[ev.Event]]) -> list[ev.Event]:
        """Cuts both streams to the calls whose rows and events are whole."""
        history: list[ev.Event] = []
        rows = self._rows.tail_first
        for i, batch in enumerate(batches):
            named = [e.row for e in batch if isinstance(e, ev.RolloutSubmitted | ev.RolloutScored) and e.row is not None]
            if any(row >= self._rows.rows for row in named):
                if i < self._closed_batches:
                    raise DataError(
                        f"events count row {max(named)}, but only {self._rows.rows} rows are left: a row segment is gone"
                    )
                break
            rows = max([rows, *(row + 1 for row in named)])
            history += batch
        self._rows.keep(rows)
        self._events.keep(len(history))
        return history

    def _check_events(self, known: dict[int, ev.SegmentClosed], folder: Path) -> None:
        for segment in self._events.closed:
            if segment.number in known and known[segment.number].crc32 != segment.crc32:
                raise DataError(
                    f"{folder}/events-{segment.number:08d}.arrow does not match its checksum: restore it from a copy"
                )

    def _recover(self, known: dict[str, dict[int, ev.SegmentClosed]]) -> None:
        """Closes the recovered tails, and notes segments that no event knows: these, or ones closed just before a kill."""
        self._rows.close_segment()
        self._events.close_segment()
        if unknown := [s for s in [*self._events.closed, *self._rows.closed] if s.number not in known[s.stream]]:
            self._append(unknown)
        dropped = {e.number for e in self.history if isinstance(e, ev.SegmentDropped)}
        for segment in [s for s in self._rows.closed if s.number in dropped]:
            self._rows.drop(segment)

    # ----------------------------------------------------------------------------------------- helpers

    def _append(self, events: Sequence[ev.Event]) -> None:
        self._events.append(ev.to_batch(events, self._events.rows, time.time()))

    def _close_rows(self) -> None:
        groups = frozenset(g for batch in self._rows.batches for g in batch.column("group").to_pylist())
        if segment := self._rows.close_segment():
            self._groups[segment.number] = groups
            self._append([segment])

    def _close_events(self) -> None:
        self._close_rows()  # a closed event must not name a row of the tail, whose end can be lost
        if segment := self._events.close_segment():
            self._append([segment])

    def _groups_of(self, segment: ev.SegmentClosed) -> frozenset[int]:
        if segment.number not in self._groups:
            self._groups[segment.number] = frozenset(self._rows.reader(segment).read_all()["group"].to_pylist())
        return self._groups[segment.number]


def locked(folder: Path, wait_s: float) -> BinaryIO:
    """A file that locks the log until it is closed, or the process ends, however it does.

    Two writers would cut each other's tails. Waits for the other one to end; raises `Unavailable` after wait_s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("wb")
    taker = threading.Thread(target=fcntl.flock, args=(file, fcntl.LOCK_EX), daemon=True)  # it has no deadline itself
    taker.start()
    taker.join(wait_s)
    if taker.is_alive():
        raise Unavailable(
            f"{folder} is still open in another process after {wait_s:g} s: two stores would spoil it; stop that one"
        )
    return file


def _decode(batch: pa.RecordBatch, where: str) -> list[ev.Event]:
    try:
        return [ev.decode(payload) for payload in batch.column("payload").to_pylist()]
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{where} holds an event that can't be read ({error}): another version of asyncrl wrote it, or it is damaged"
        ) from error
