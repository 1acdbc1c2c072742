"""The open tail of a stream: records, each an Arrow IPC message behind a header with its length and checksum.

    magic, bytes (u32), CRC-32 (u32) | schema    then the same with a record batch, for each append

A record without a message is a mark: all that stands before it was on the disk when it was written. So a record that is not
whole is damage if a mark follows, and is named. If none does, it is what a kill or a power failure left of writes that nobody
had synced, cut short, filled with zeros or out of order: it is dropped, with all that follows.
"""

import logging
import struct
import zlib
from pathlib import Path

import pyarrow as pa

from asyncrl.errors import DataError

log = logging.getLogger(__name__)
_MAGIC = b"\x89tail\r\n\x1a"
_HEADER = struct.Struct("<8sII")  # 16 bytes, as Arrow's messages are aligned to 8


def record(message: pa.Buffer | bytes) -> bytes:
    """What stands in the file for one message."""
    return b"".join((_HEADER.pack(_MAGIC, len(message), zlib.crc32(message)), message))


MARK = record(b"")


def read_tail(path: Path, *schemas: pa.Schema) -> list[pa.RecordBatch]:
    """The batches of an open tail, one per append, up to the first record that is not whole.

    Raises `DataError` if that one is damaged, or the tail is of none of these schemas, `FileNotFoundError` if it was closed
    meanwhile.
    """
    data = path.read_bytes()
    messages, end = whole_messages(data)
    if end < len(data):
        if data.find(MARK, end) >= 0:
            raise DataError(
                f"{path} is damaged at byte {end} of {len(data)}, in what was on the disk already: restore it from a copy; or "
                f"give up what follows with `truncate -s {end} {path}`, and resume from the newest checkpoint that is then left"
            )
        log.info(
            "%s: the last %d of %d bytes are not whole, and nobody had synced them: dropped", path, len(data) - end, len(data)
        )
    if not messages:
        return []
    found = pa.ipc.read_schema(messages[0])
    if not any(found.equals(known, check_metadata=True) for known in schemas):
        raise other_version(path)
    return [pa.ipc.read_record_batch(pa.ipc.read_message(message), found) for message in messages[1:]]


def other_version(path: Path) -> DataError:
    return DataError(f"{path} was written by another version of asyncrl: read and resume the run with that version")


def whole_messages(data: bytes) -> tuple[list[pa.Buffer], int]:
    """The messages of the leading records that are whole, which are not copied, and the place where these end."""
    buffer, messages, end = pa.py_buffer(data), [], 0
    while end + _HEADER.size <= len(data):
        magic, size, checksum = _HEADER.unpack_from(data, end)
        begin, following = end + _HEADER.size, end + _HEADER.size + size
        if magic != _MAGIC or following > len(data) or zlib.crc32(message := buffer.slice(begin, size)) != checksum:
            break
        if size:
            messages.append(message)
        end = following
    return messages, end
