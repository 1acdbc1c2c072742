"""The log on disk: the source of truth, never rewound. Streams of rows, pieces and events: rows and pieces first, then the
event that makes them count. "Acknowledged" means handed to the operating system: it survives any kill of the process. What
`sync` returned for also survives a power failure."""

import fcntl
import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from msgspec.structs import replace

import asyncrl.replay.log.events as ev
from asyncrl.config import StoreSpec
from asyncrl.errors import DataError, Unavailable
from asyncrl.replay.log.pieces import PIECES, joined
from asyncrl.replay.log.rows import ROWS
from asyncrl.replay.log.segments import Segments
from asyncrl.replay.log.snapshots import LogSnapshot, newest_snapshot, write_snapshot
from asyncrl.types import Tokens

log = logging.getLogger(__name__)
_TAIL_BYTES = 16 << 20  # of events, at most: a restart reads all of it, and of rows only what is needed; and of pieces
_NAMED_BY = {"rows": "row", "pieces": "piece"}  # how events name what they make count


class ReplayLog:
    """Opens or creates the log in `folder` and recovers what a kill left. `state` is what the newest snapshot says, empty if
    there is none; `history` holds every acknowledged event since then.

    A tail that was cut is closed into a segment up to the last call whose rows and events are both whole.
    spec.fsync `segment`: closed segments are synced, tails by `sync`; `call`: every acknowledged call.
    Its owner holds `locked(folder)`. Raises `DataError` naming the file if what was on the disk already is damaged.
    """

    def __init__(self, folder: Path, spec: StoreSpec = StoreSpec()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._spec = spec
        self._folder = folder
        self._snapshot = newest_snapshot(folder / "events")
        self._bytes_since = self._snapshot_bytes = 0  # of events that were closed since the last one, and of that
        self._events = Segments(folder, "events", ev.EVENTS, self._snapshot.segments("events"))
        closed, calls = self._read_events()
        self._rows, self._pieces = (
            Segments(folder, stem, schema, self._snapshot.segments(stem) | _noted(stem, [*closed, *calls]))
            for stem, schema in (("rows", ROWS), ("pieces", PIECES))
        )
        self.state = self._snapshot.state
        self.history: list[ev.Event] = self._acknowledged(closed, calls)
        self._recover()

    # ----------------------------------------------------------------------------------------- append

    def append_rows(self, batch: pa.RecordBatch) -> int:
        """The number of the first row. The rows don't count until an event names them."""
        return self._rows.append(batch)

    def append_pieces(self, batch: pa.RecordBatch) -> int:
        """The same for pieces of unfinished rollouts."""
        return self._pieces.append(batch)

    def append_events(self, events: Sequence[ev.Event]) -> None:
        """One call's events, whole or not at all. Closes segments that are full."""
        self._append(events)
        if self._rows.tail_bytes >= self._spec.segment_bytes:
            self._close(self._rows)
        if self._pieces.tail_bytes >= min(self._spec.segment_bytes, _TAIL_BYTES):
            self._close(self._pieces)
        if self._events.tail_bytes >= min(self._spec.segment_bytes, _TAIL_BYTES):
            self._close_events()

    @property
    def due(self) -> bool:
        """Whether events were closed since the last snapshot, and as many bytes as that has: so these cost no more than
        events do, however much is outstanding."""
        return self.events_closed > self._snapshot.events and self._bytes_since >= self._snapshot_bytes

    @property
    def events_closed(self) -> int:
        """How many events stand in closed segments."""
        return self._events.tail_first

    def snapshot(self, state: bytes) -> None:
        """Where `due`, before anything else is appended: a restart begins with `state` then, which is what all events so far
        came to. Returns when it is on the disk."""
        closed = tuple(chain.from_iterable(stream.known.values() for stream in (self._events, self._rows, self._pieces)))
        self._snapshot = LogSnapshot(events=self.events_closed, closed=closed)
        self._bytes_since, self._snapshot_bytes = 0, len(state)
        write_snapshot(self._folder / "events", self._events.closed[-1].number, replace(self._snapshot, state=state))

    def find(self, *kinds: type[ev.Event]) -> Iterator[ev.Event]:
        """All acknowledged events of these kinds, oldest first. A segment at a time is read."""
        names, columns = [kind.__struct_config__.tag for kind in kinds], ["kind", "payload"]
        closed = (self._events.read(segment, columns) for segment in self._events.closed)
        tail = pa.Table.from_batches(self._events.batches, ev.EVENTS).select(columns)
        for table in chain(closed, [tail]):
            yield from _decode(table.filter(pc.is_in(table["kind"], pa.array(names))), f"{self._folder}/events")

    def sync(self) -> None:
        """Returns when all that was appended is on the disk."""
        self._rows.sync()  # first: events that are on the disk name only rows and pieces that are
        self._pieces.sync()
        self._events.sync()

    def take(self, rows: Sequence[int], columns: list[str]) -> pa.RecordBatch:
        """Rows by number, in this order."""
        return self._rows.take(rows, columns)

    def take_pieces(self, pieces: Sequence[int]) -> Tokens:
        """What the pieces with these numbers are together."""
        return joined(self._pieces.take(pieces, PIECES.names))

    def trim(self, needed: Iterable[int]) -> None:
        """Deletes closed segments of pieces without one of `needed`, as `truncate` does those of rows."""
        self._drop(self._pieces, self._unneeded(self._pieces, needed, 0))

    def truncate(self, needed: Iterable[int]) -> int:
        """While closed row segments hold more than spec.keep_bytes, deletes the oldest of those without a row of `needed`; how
        many. What the log says up to then is on the disk before a file goes."""
        unwanted = self._unneeded(self._rows, needed, self._spec.keep_bytes)
        if unwanted and len(self._rows.known) > max(self._rows.known):  # these are the first
            log.warning(
                "the replay log holds more than store.keep_bytes=%d of closed rows: from now on the oldest are deleted, "
                "but for what a resume needs",
                self._spec.keep_bytes,
            )
        self._drop(self._rows, unwanted)
        return len(unwanted)

    @staticmethod
    def _unneeded(stream: Segments, needed: Iterable[int], keep_bytes: int) -> list[ev.SegmentClosed]:
        """The oldest segments without a row of `needed`, as many as there are above keep_bytes."""
        over = sum(map(stream.size, stream.closed)) - keep_bytes
        unwanted, rows = [], sorted(needed) if over > 0 else []
        for segment in stream.closed:
            following = bisect_left(rows, segment.first)
            if over > 0 and (following == len(rows) or rows[following] >= segment.first + segment.count):
                unwanted.append(segment)
                over -= stream.size(segment)
        return unwanted

    def _drop(self, stream: Segments, unwanted: Sequence[ev.SegmentClosed]) -> None:
        if unwanted:
            self._append([ev.SegmentDropped(segment.number, segment.stream) for segment in unwanted])
            self.sync()
        for segment in unwanted:
            stream.drop(segment.number)

    def seal(self) -> None:
        """Turns the tails into closed segments, for tools that read nothing else. What still stands in the events' tail then
        is of no use to them. Without room on the disk the tails stay as they are, and nothing is lost."""
        try:
            self._close_events()
        except OSError as error:
            log.warning("the end of the replay log stays in its tails, which asyncrl.replay.open reads: %s", error)

    def close(self) -> None:
        """Closes the files. A tail stays as it is: the next opening turns it into a segment."""
        try:
            self.sync()
        finally:
            for stream in (self._rows, self._pieces, self._events):
                stream.release()

    # ---------------------------------------------------------------------------------------- recover

    def _read_events(self) -> tuple[list[list[ev.Event]], list[list[ev.Event]]]:
        """The events after the snapshot: of closed segments, and those of the tail, one list per call.

        Newest segments first: the checksum of each is noted in a later one, and it is not read before it is checked."""
        folder = self._folder
        calls = [_decode(batch, f"the tail of {folder}/events") for batch in self._events.batches]
        closed: list[list[ev.Event]] = []
        noted = self._snapshot.segments("events") | _noted("events", calls)
        for segment in reversed(self._events.closed):
            if segment.first < self._snapshot.events:
                break
            where = f"{folder}/events/{segment.number:08d}.parquet"
            if noted.get(segment.number, segment).crc32 != segment.crc32:
                raise DataError(f"{where} does not match its checksum: restore it from a copy")
            read = _decode(self._events.read(segment, ["payload"]), where)
            noted |= _noted("events", [read])
            closed.insert(0, read)
        if gone := sorted(noted.keys() - {segment.number for segment in self._events.closed}):
            raise DataError(f"{folder}/events/{gone[0]:08d}.parquet is missing, but a later event counts it: restore the file")
        return closed, calls

    def _acknowledged(self, closed: list[list[ev.Event]], calls: list[list[ev.Event]]) -> list[ev.Event]:
        """Cuts the tails to the calls whose rows, pieces and events are whole."""
        if (last := _last("rows", closed)) >= self._rows.rows:
            raise DataError(f"events count row {last}, but only {self._rows.rows} rows are left: a row segment is gone")
        there = {"rows": self._rows, "pieces": self._pieces}
        whole = list(takewhile(lambda call: all(_last(stem, [call]) < there[stem].rows for stem in there), calls))
        history = [event for call in [*closed, *whole] for event in call]
        for stem, stream in there.items():
            stream.keep(max(stream.tail_first, 1 + _last(stem, [history])))
        self._events.keep(self._snapshot.events + len(history))
        return history

    def _recover(self) -> None:
        """Closes the recovered tails, and notes segments that no event knows: these, or ones closed just before a kill."""
        streams = {"rows": self._rows, "pieces": self._pieces, "events": self._events}
        for stream in streams.values():
            stream.close_segment()
        told = chain(self._snapshot.closed, self.history)
        noted = {(e.stream, e.number) for e in told if isinstance(e, ev.SegmentClosed)}
        closed = chain.from_iterable(stream.closed for stream in reversed(streams.values()))
        if unknown := [s for s in closed if (s.stream, s.number) not in noted]:
            self._append(unknown)
            self._events.sync()
        for event in self.history:
            if isinstance(event, ev.SegmentDropped):
                streams[event.stream].drop(event.number)

    # ----------------------------------------------------------------------------------------- helpers

    def _append(self, events: Sequence[ev.Event]) -> None:
        self._events.append(ev.to_batch(events, self._events.rows, time.time()))
        if self._spec.fsync == "call":
            self.sync()

    def _close(self, stream: Segments) -> None:
        if stream.tail_bytes and (segment := stream.close_segment()):
            self._note(segment)

    def _close_events(self) -> None:
        self._close(self._rows)  # a closed event must not name a row of the tail, whose end can be lost
        self._close(self._pieces)
        self._bytes_since += self._events.tail_bytes
        self._close(self._events)

    def _note(self, segment: ev.SegmentClosed) -> None:
        self._append([segment])
        self._events.sync()  # its checksum is of use only where it survives


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


def _last(stream: str, calls: Iterable[list[ev.Event]]) -> int:
    """The highest number of a row (or piece) that these events make count; -1 if there is none."""
    numbers = (getattr(event, _NAMED_BY[stream], None) for call in calls for event in call)
    return max((number for number in numbers if number is not None), default=-1)


def _decode(events: pa.RecordBatch | pa.Table, where: str) -> list[ev.Event]:
    try:
        return [ev.decode(payload) for payload in events.column("payload").to_pylist()]
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{where} holds an event that can't be read ({error}): another version of asyncrl wrote it, or it is damaged"
        ) from error
