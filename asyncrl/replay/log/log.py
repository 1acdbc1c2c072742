"""The log on disk: the source of truth, never rewound. Two streams, rows and events: rows first, then the event that makes
them count. "Acknowledged" means handed to the operating system: it survives any kill of the process. What `sync` returned for
also survives a power failure."""

import fcntl
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
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
    spec.fsync `segment`: closed segments are synced, tails by `sync`; `call`: every acknowledged call.
    Its owner holds `locked(folder)`. Raises `DataError` naming the file if what was on the disk already is damaged.
    """

    def __init__(self, folder: Path, spec: StoreSpec = StoreSpec()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._spec = spec
        self._groups: dict[int, frozenset[int]] = {}  # of closed row segments, by number
        self._events = Segments(folder, "events", ev.EVENTS, spec.fsync == "call", {})
        closed, calls = self._read_events(folder)
        self._rows = Segments(folder, "rows", ROWS, spec.fsync == "call", _noted("rows", [*closed, *calls]))
        self.history: list[ev.Event] = self._acknowledged(closed, calls)
        self._recover()

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

    def sync(self) -> None:
        """Returns when all that was appended is on the disk."""
        self._rows.sync()  # first: events that are on the disk name only rows that are
        self._events.sync()

    def take(self, rows: Sequence[int], columns: list[str]) -> pa.RecordBatch:
        """Rows by number, in this order."""
        return self._rows.take(rows, columns)

    def truncate(self, wanted: Collection[int]) -> int:
        """Deletes closed row segments that hold no group of `wanted`, unless spec.keep_segments is `all`; how many.

        What the log says up to then is on the disk before a file goes."""
        if self._spec.keep_segments == "all":
            return 0
        unwanted = [s for s in self._rows.closed if self._groups_of(s).isdisjoint(wanted)]
        if unwanted:
            self._append([ev.SegmentDropped(segment.number) for segment in unwanted])
            self.sync()
        for segment in unwanted:
            self._rows.drop(segment)
            del self._groups[segment.number]
        return len(unwanted)

    def close(self) -> None:
        """Closes the files. The tails stay as they are: the next opening closes them into segments."""
        for stream in (self._rows, self._events):
            stream.sync()
            stream.release()

    # ---------------------------------------------------------------------------------------- recover

    def _read_events(self, folder: Path) -> tuple[list[list[ev.Event]], list[list[ev.Event]]]:
        """The events of closed segments, and those of the tail, one list per call.

        Newest segments first: the checksum of each is noted in a later one, and it is not read before it is checked."""
        calls = [_decode(batch, f"the tail of {folder}/events") for batch in self._events.recovered]
        closed: list[list[ev.Event]] = []
        noted = _noted("events", calls)
        for segment in reversed(self._events.closed):
            where = f"{folder}/events-{segment.number:08d}.arrow"
            if noted.get(segment.number, segment).crc32 != segment.crc32:
                raise DataError(f"{where} does not match its checksum: restore it from a copy")
            read = [_decode(batch, where) for batch in self._events.reader(segment).read_all().to_batches()]
            noted |= _noted("events", read)
            closed = read + closed
        if gone := sorted(noted.keys() - {segment.number for segment in self._events.closed}):
            raise DataError(f"{folder}/events-{gone[0]:08d}.arrow is missing, but a later event counts it: restore the file")
        return closed, calls

    def _acknowledged(self, closed: list[list[ev.Event]], calls: list[list[ev.Event]]) -> list[ev.Event]:
        """Cuts both tails to the calls whose rows and events are whole."""
        if (last := _last_row(closed)) >= self._rows.rows:
            raise DataError(f"events count row {last}, but only {self._rows.rows} rows are left: a row segment is gone")
        whole = list(takewhile(lambda call: _last_row([call]) < self._rows.rows, calls))
        history = [event for call in [*closed, *whole] for event in call]
        self._rows.keep(max(self._rows.tail_first, 1 + _last_row([history])))
        self._events.keep(len(history))
        return history

    def _recover(self) -> None:
        """Closes the recovered tails, and notes segments that no event knows: these, or ones closed just before a kill."""
        self._rows.close_segment()
        self._events.close_segment()
        noted = {(e.stream, e.number) for e in self.history if isinstance(e, ev.SegmentClosed)}
        if unknown := [s for s in [*self._events.closed, *self._rows.closed] if (s.stream, s.number) not in noted]:
            self._append(unknown)
            self._events.sync()
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
            self._note(segment)

    def _close_events(self) -> None:
        self._close_rows()  # a closed event must not name a row of the tail, whose end can be lost
        if segment := self._events.close_segment():
            self._note(segment)

    def _note(self, segment: ev.SegmentClosed) -> None:
        self._append([segment])
        self._events.sync()  # its checksum is of use only where it survives

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


def _noted(stream: str, calls: Iterable[list[ev.Event]]) -> dict[int, ev.SegmentClosed]:
    """The closed segments of a stream that these events tell of, by number."""
    return {e.number: e for call in calls for e in call if isinstance(e, ev.SegmentClosed) and e.stream == stream}


def _last_row(calls: Iterable[list[ev.Event]]) -> int:
    """The highest number of a row that these events make count; -1 if there is none."""
    rows = (
        e.row for call in calls for e in call if isinstance(e, ev.RolloutSubmitted | ev.RolloutScored) and e.row is not None
    )
    return max(rows, default=-1)


def _decode(batch: pa.RecordBatch, where: str) -> list[ev.Event]:
    try:
        return [ev.decode(payload) for payload in batch.column("payload").to_pylist()]
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{where} holds an event that can't be read ({error}): another version of asyncrl wrote it, or it is damaged"
        ) from error
