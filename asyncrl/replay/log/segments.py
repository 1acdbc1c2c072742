"""One append-only stream of record batches on disk: closed segments, which are Parquet files, and an open tail (tail.py).

    rows/00000000.parquet  rows/00000001.parquet  rows/_00000002.tail

What reads a folder of Parquet files (pandas, pyarrow) passes over names that begin with `_`.

An appended batch is handed to the operating system before `append` returns, so it survives any kill of the process; what
`sync` was called for also survives a power failure. A batch that was cut while it was written is dropped when the stream is
opened again.
"""

import contextlib
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from asyncrl.errors import DataError
from asyncrl.replay.log.events import SegmentClosed
from asyncrl.replay.log.tail import MARK, other_version, read_tail, record
from asyncrl.rundir import sync

_CHUNK_BYTES = 4 << 20  # of a closed segment, in memory: one row is read with as much around it (a row group of Parquet)
_JOIN_BATCHES = 128
_OPEN_FILES = 8  # closed segments that are held open; the history may have thousands


def open_closed(path: Path, *schemas: pa.Schema) -> pq.ParquetFile:
    """A memory-mapped closed segment. Raises `DataError` if it can't be parsed or is of none of these schemas."""
    with readable(path):
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    found = file.schema_arrow
    if not any(found.equals(schema) and found.metadata == schema.metadata for schema in schemas):
        raise other_version(path)
    return file


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around what reads a closed segment: damage is a `DataError` that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({error}): restore it from a copy, or resume elsewhere"
        ) from error


def listing(folder: Path, stem: str) -> tuple[list[tuple[int, Path]], list[tuple[int, Path]]]:
    """(closed, tails) of a stream as (number, path), in order. A tail whose segment is closed already is left out.

    Raises `DataError` for files of a version whose streams had no folders of their own.
    """
    for old in folder.glob(f"{stem}-*"):
        raise other_version(old)
    found: dict[str, list[tuple[int, Path]]] = {"parquet": [], "tail": []}
    for path in sorted((folder / stem).glob("*")):
        if match := re.fullmatch(r"_?(\d+)\.(parquet|tail)", path.name):
            found[match[2]].append((int(match[1]), path))
    closed = {number for number, _ in found["parquet"]}
    return found["parquet"], [(number, path) for number, path in found["tail"] if number not in closed]


class Segments:
    """A stream, and all that is done with its files. Opening reads the tail's whole batches; the owner then calls `keep`
    and `close_segment` before the first `append`.

    known: what the event log says of this stream's closed segments, by number: of all that were not deleted, and of the
    newest. An unknown file of a lower number than that is left of a deleted one. It is kept up to date.
    """

    def __init__(self, folder: Path, stem: str, schema: pa.Schema, known: dict[int, SegmentClosed]) -> None:
        self._folder = folder / stem
        self._folder.mkdir(parents=True, exist_ok=True)
        sync(folder)
        self._stem = stem
        self._schema = schema
        self._reader = lru_cache(_OPEN_FILES)(self._open)
        self.closed: list[SegmentClosed] = []
        closed, tails = listing(folder, stem)
        self.known = known
        for number, path in closed:
            if number not in known and number < max(known, default=0):
                path.unlink()
                continue
            if number not in known:  # closed just before a kill: the event log does not know it yet
                count = open_closed(path, schema).metadata.num_rows
                known[number] = SegmentClosed(stem, number, _end(known), count, _crc32(path))
            self.closed.append(known[number])
        self.tail_first = _end(known)
        self._hold([batch for _, path in tails for batch in read_tail(path, schema)])
        self._number = max([max(known, default=-1) + 1, *(n for n, _ in tails)])
        self._file = -1
        self._unsynced = False
        for leftover in [*self._folder.glob("_*.writing"), *(self._path("tail", n) for n, _ in closed)]:
            leftover.unlink(missing_ok=True)

    def keep(self, rows: int) -> None:
        """Drops rows of the tail from number `rows` on: nobody was told that they count."""
        self._hold(pa.Table.from_batches(self.batches, self._schema).slice(0, rows - self.tail_first).to_batches())

    def append(self, batch: pa.RecordBatch) -> int:
        """The number of the batch's first row. Returns when the operating system has it."""
        first = self.rows
        if self._file < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # opening the log left no tail
            self._file = os.open(self._path("tail"), flags, 0o644)
            self._write(record(self._schema.serialize()))
            sync(self._folder)
        message = record(batch.serialize())
        self._write(message)
        self._unsynced = True
        self._push(batch)
        self._join()
        self.tail_bytes += len(message)
        return first

    def sync(self) -> None:
        """Returns when the tail is on the disk. A mark in it says so."""
        if self._unsynced:
            os.fsync(self._file)
            self._write(MARK)
            self._unsynced = False

    def close_segment(self) -> SegmentClosed | None:
        """Turns the tail into an immutable file: written beside, synced, renamed. None if the tail is empty."""
        segment = None
        tail, count = self._path("tail"), self.rows - self.tail_first
        if count:
            beside, final = self._path("writing"), self._path("parquet")
            try:
                _write_closed(beside, pa.Table.from_batches(self.batches, self._schema))
                sync(beside)
            except OSError:
                beside.unlink(missing_ok=True)
                raise
            segment = SegmentClosed(self._stem, self._number, self.tail_first, count, _crc32(beside))
            os.rename(beside, final)
            sync(self._folder)
            self.closed.append(segment)
            self.known[segment.number] = segment
            self._number += 1
        self.release()
        tail.unlink(missing_ok=True)
        self.tail_first = self.rows
        self._hold([])
        return segment

    def read(self, segment: SegmentClosed, columns: list[str], chunk: int | None = None) -> pa.Table:
        """These columns of a closed segment, or of one of its chunks. Raises `DataError`."""
        reader = self._reader(segment)
        with readable(self._path("parquet", segment.number)):
            table = reader.read(columns) if chunk is None else reader.read_row_group(chunk, columns)
        return table.select(columns)  # Parquet keeps its own order

    def size(self, segment: SegmentClosed) -> int:
        """Bytes of a closed segment's file."""
        return self._path("parquet", segment.number).stat().st_size

    def take(self, rows: Sequence[int], columns: list[str]) -> pa.RecordBatch:
        """The rows with these numbers, in this order. Raises `DataError` for one whose segment is gone."""
        found: dict[tuple[int, int], pa.RecordBatch] = {}
        runs: list[tuple[tuple[int, int], int, int]] = []  # rows in a line: which batch, first, after the last
        for row in rows:
            at, place = self._place(row)
            if at not in found:
                found[at] = self._batch(*at, columns)
            if runs and runs[-1][0] == at and runs[-1][2] == place:
                runs[-1] = at, runs[-1][1], place + 1
            else:
                runs.append((at, place, place + 1))
        schema = pa.schema([self._schema.field(c) for c in columns])
        picked = [found[at].slice(first, end - first) for at, first, end in runs]
        return pa.concat_batches(picked) if picked else pa.RecordBatch.from_pylist([], schema)

    def _place(self, row: int) -> tuple[tuple[int, int], int]:
        """The batch that a row is in, (place in `closed`, chunk) or, in the tail, (-1, place), and the row's place in that."""
        if row >= self.tail_first:
            place = bisect_right(self._starts, row) - 1
            return (-1, place), row - self._starts[place]
        place = bisect_right(self.closed, row, key=lambda s: s.first) - 1
        if place < 0 or row >= self.closed[place].first + self.closed[place].count:
            raise DataError(f"row {row} of {self._stem} was deleted with its segment: no retained checkpoint needed it")
        segment = self.closed[place]
        chunk, rest = divmod(row - segment.first, self._reader(segment).metadata.row_group(0).num_rows)
        return (place, chunk), rest

    def _batch(self, place: int, chunk: int, columns: list[str]) -> pa.RecordBatch:
        if place < 0:
            return self.batches[chunk].select(columns)
        (batch,) = self.read(self.closed[place], columns, chunk).combine_chunks().to_batches()
        return batch

    def drop(self, number: int) -> None:
        """Deletes a closed segment."""
        self._reader.cache_clear()  # a file that is open keeps its place on the disk
        self._path("parquet", number).unlink(missing_ok=True)
        self.closed = [segment for segment in self.closed if segment.number != number]
        if number < max(self.known):
            self.known.pop(number, None)

    def release(self) -> None:
        """Closes the tail's file descriptor."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._unsynced = -1, False

    def _open(self, segment: SegmentClosed) -> pq.ParquetFile:
        """A closed segment, verified against its checksum."""
        path = self._path("parquet", segment.number)
        if not path.exists():
            raise DataError(f"{path} is missing, but the event log counts its {segment.count} rows: restore the file")
        found = _crc32(path)
        if found != segment.crc32:
            raise DataError(
                f"{path} has checksum {found:08x}, the event log says {segment.crc32:08x}: the file is damaged; "
                "restore it from a copy; a newer checkpoint, if there is one, needs fewer of its rows"
            )
        return open_closed(path, self._schema)

    def _hold(self, batches: list[pa.RecordBatch]) -> None:
        self.batches: list[pa.RecordBatch] = []  # of the tail, in memory: one per append, until many are joined
        self._starts: list[int] = []  # number of the first row of each
        self._loose = 0  # batches at the end that are not joined yet
        self.rows = self.tail_first  # of the stream so far, deleted ones included: the number of the next row
        self.tail_bytes = 0
        for batch in batches:
            self._push(batch)

    def _push(self, batch: pa.RecordBatch) -> None:
        self.batches.append(batch)
        self._starts.append(self.rows)
        self.rows += batch.num_rows
        self._loose += 1

    def _join(self) -> None:
        if self._loose == _JOIN_BATCHES:  # a batch per call costs memory, and time when the segment is closed
            self.batches[-_JOIN_BATCHES:] = [pa.concat_batches(self.batches[-_JOIN_BATCHES:])]
            del self._starts[1 - _JOIN_BATCHES :]
            self._loose = 0

    def _path(self, suffix: str, number: int | None = None) -> Path:
        hidden = "" if suffix == "parquet" else "_"
        return self._folder / f"{hidden}{self._number if number is None else number:08d}.{suffix}"

    def _write(self, data: bytes) -> None:
        """All of it, or nothing: what is torn would be damage as soon as something follows it."""
        end, view = os.lseek(self._file, 0, os.SEEK_CUR), memoryview(data)
        try:
            while len(view):
                view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
            raise


def _write_closed(path: Path, table: pa.Table) -> None:
    """zstd at its fastest, and dictionaries for texts alone: of numbers they would cost five times the rest."""
    rows = max(1, _CHUNK_BYTES * table.num_rows // max(1, table.nbytes))
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=texts, write_page_checksum=True) as writer:
        for first in range(0, table.num_rows, rows):
            writer.write_table(table.slice(first, rows).combine_chunks(), row_group_size=rows)


def _end(segments: dict[int, SegmentClosed]) -> int:
    """Number of the row after all of them."""
    return max((s.first + s.count for s in segments.values()), default=0)


def _crc32(path: Path) -> int:
    with path.open("rb") as file:
        crc = 0
        while block := file.read(4 << 20):
            crc = zlib.crc32(block, crc)
    return crc
