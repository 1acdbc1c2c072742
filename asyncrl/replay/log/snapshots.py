"""Snapshots of the event log: what all events up to the end of a closed segment came to. A restart reads the newest snapshot,
and of the events only those that came after it.

    events/00000012.parquet  events/_00000012.snapshot

A snapshot is written once its segment is on the disk, and whole or not at all. The one before it stays until the next, and
all events do: where a snapshot is damaged, an older one and more events come to the same.
"""

import logging
from pathlib import Path

import msgspec
from msgspec import Struct

from asyncrl.replay.log.events import SegmentClosed
from asyncrl.replay.log.tail import record, whole_messages
from asyncrl.rundir import sweep, write_atomic

log = logging.getLogger(__name__)
_FORMAT = 1  # of the file and of `state`: to be raised whenever an older one would be read wrongly
_KEPT = 2


class LogSnapshot(Struct, frozen=True, kw_only=True):
    """As it stands in its file, in a record like those of a tail, with a checksum."""

    format: int = _FORMAT
    events: int = 0  # how many came before it
    closed: tuple[SegmentClosed, ...] = ()  # whose files were there; of each stream the newest also where its file was deleted
    state: bytes = b""  # what these events came to, which is the store's own business

    def segments(self, stream: str) -> dict[int, SegmentClosed]:
        """The closed segments of a stream, by number."""
        return {segment.number: segment for segment in self.closed if segment.stream == stream}


def write_snapshot(folder: Path, number: int, snapshot: LogSnapshot) -> None:
    """number: of the segment at whose end it was taken. Returns when it is on the disk. Raises DiskFull."""
    write_atomic(_path(folder, number), record(msgspec.msgpack.encode(snapshot)))
    for older in _newest_first(folder)[_KEPT:]:
        older.unlink()


def newest_snapshot(folder: Path) -> LogSnapshot:
    """The newest that is whole, of no events if there is none. One that isn't is named in the process's log."""
    if folder.exists():
        sweep(folder)
    for path in _newest_first(folder):
        try:
            (message,), _ = whole_messages(path.read_bytes())
            snapshot = msgspec.msgpack.decode(message, type=LogSnapshot)
            if snapshot.format == _FORMAT:
                return snapshot
        except (ValueError, msgspec.MsgspecError):
            pass
        log.warning(
            "%s is damaged, or of another version of asyncrl: it is passed over, and more events are read instead", path
        )
    return LogSnapshot()


def _path(folder: Path, number: int) -> Path:
    return folder / f"_{number:08d}.snapshot"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("_*.snapshot"), reverse=True)
