"""A version as what changed of it: for every block of 4 MiB the elements whose bits differ from the version before, and their
new values, which overwrite the old ones. So a delta may be applied twice, and to what has some of it already.

    encode   old block, new block ─► changed elements ─► positions as a bitmap or as gaps, values ─► zstd where that is smaller
    apply    old block ─► overwrite ─► compare its checksum with that of the new block ─► write

Elements are compared and moved as bits, whatever their dtype. Bytes of many values stand one after another by significance:
first all the lowest ones, which are noise, at last the highest, sign and exponent, which compress.
"""

from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import xxhash
from msgspec import Struct

from asyncrl.errors import BadTransfer
from asyncrl.models.layout import DTYPES, TensorSpec
from asyncrl.models.memory import WeightMemory

BLOCK_BYTES = 4 << 20  # compared, patched and verified as one; positions count within it
PAYS = 0.5  # a delta of more than this share of the whole costs more to make and to apply than it saves

Coding = Literal["bitmap", "uint8", "uint16", "dense"]
_GAPS: tuple[Coding, ...] = ("uint8", "uint16")
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Packed(Struct, frozen=True, array_like=True):
    """Bytes, compressed if there are fewer of them than `nbytes`."""

    nbytes: int
    data: memoryview


class Part(Struct, frozen=True, array_like=True):
    """What changed among elements of one size that lie together."""

    start: int  # byte of the block
    count: int  # elements, changed or not
    itemsize: int
    coding: Coding  # of positions: a bit for each element; gaps between changed ones, of so many bits; none, for all are here
    positions: Packed
    values: Packed


class Delta(Struct, frozen=True, array_like=True):
    """All that changed from one version to another."""

    total_bytes: int  # of either version
    checksums: tuple[int, ...]  # of the new one's blocks, changed or not
    blocks: tuple[tuple[Part, ...], ...]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Delta).decode


def encode_delta(
    base: WeightMemory, new: WeightMemory, specs: Sequence[TensorSpec], enough: Event | None = None
) -> bytes | None:
    """What changed between two versions whose tensors lie alike; None if that doesn't pay. Reads both once.

    enough: once it is set, the rest is not looked at, and None returned.
    """
    checksums, blocks, nbytes = [], [], 0
    for index, runs in enumerate(_runs_by_block(specs, new.nbytes)):
        if enough is not None and enough.is_set():
            return None
        old_block, new_block = _read(base, index), _read(new, index)
        checksums.append(_checksum(index, new_block))
        parts = [_part(old_block, new_block, *run) for run in runs]
        blocks.append(tuple(part for part in parts if part is not None))
        nbytes += sum(len(part.positions.data) + len(part.values.data) for part in blocks[-1])
        if nbytes > PAYS * new.nbytes:
            return None
    return _encode(Delta(new.nbytes, tuple(checksums), tuple(blocks)))


def apply_deltas(base: WeightMemory, deltas: Sequence[memoryview], new: WeightMemory) -> None:
    """Writes `base` into `new`, overwritten by one delta after another.

    Raises BadTransfer if what comes of it is not what the last delta was made from: because of another base, or of damage. Then
    `new` is worthless.
    """
    try:
        decoded = [_decode(delta) for delta in deltas]
        count = -(-new.nbytes // BLOCK_BYTES)
        for delta in decoded:
            if delta.total_bytes != base.nbytes or {len(delta.checksums), len(delta.blocks)} != {count}:
                raise BadTransfer(f"a delta of {delta.total_bytes} bytes for a version of {base.nbytes}; not shown")
        for index in range(count):
            block = _read(base, index)
            for delta in decoded:
                for part in delta.blocks[index]:
                    _overwrite(block, part)
            if (found := _checksum(index, block)) != (expected := decoded[-1].checksums[index]):
                raise BadTransfer(
                    f"block {index} of {count} has checksum {found:016x} after a delta, not {expected:016x}: it was made "
                    "against other weights; not shown"
                )
            new.write(index * BLOCK_BYTES, block.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, IndexError, TypeError) as error:
        raise BadTransfer(f"a delta can't be applied: {error}; not shown") from error


def _runs_by_block(specs: Sequence[TensorSpec], nbytes: int) -> Iterator[list[tuple[int, int, int]]]:
    """For each block where in it elements of one size lie together: first byte, their count, their size."""
    runs: list[list[int]] = []
    for offset, end, itemsize in sorted({(s.offset, s.end, min(8, DTYPES[s.dtype].itemsize)) for s in specs if s.nbytes}):
        if runs and runs[-1][2] == itemsize:  # what lies between two tensors is zero in every version
            runs[-1][1] = max(end, runs[-1][1])
        else:
            runs.append([offset, end, itemsize])
    for begin in range(0, nbytes, BLOCK_BYTES):
        inside = [(max(start, begin), min(end, begin + BLOCK_BYTES), size) for start, end, size in runs]
        yield [(start - begin, (end - start) // size, size) for start, end, size in inside if start < end]


def _read(memory: WeightMemory, index: int) -> Bytes:
    block = np.empty(min(BLOCK_BYTES, memory.nbytes - index * BLOCK_BYTES), np.uint8)
    memory.read(index * BLOCK_BYTES, block.data)
    return block


def _checksum(index: int, block: Bytes) -> int:
    return xxhash.xxh3_64_intdigest(block.data, index)


def _part(old: Bytes, new: Bytes, start: int, count: int, itemsize: int) -> Part | None:
    elements = slice(start, start + count * itemsize)
    before, now = (block[elements].view(f"u{itemsize}") for block in (old, new))
    changed = before != now
    where = np.flatnonzero(changed)
    if not len(where):
        return None
    coding, positions = _shortest(changed, where)
    if len(positions) + len(where) * itemsize >= now.nbytes:
        nothing = Packed(0, memoryview(b""))
        return Part(start, count, itemsize, "dense", nothing, Packed(now.nbytes, memoryview(now.tobytes())))
    return Part(start, count, itemsize, coding, _pack(positions), _pack(_planes(now[where])))


def _shortest(changed: np.ndarray, where: np.ndarray) -> tuple[Coding, bytes]:
    gaps = np.diff(where, prepend=-1) - 1
    sizes = {of: (len(gaps) + int((gaps // np.iinfo(of).max).sum())) * np.dtype(of).itemsize for of in _GAPS}
    best = min(_GAPS, key=lambda of: sizes[of])
    if sizes[best] * 8 >= len(changed):
        return "bitmap", np.packbits(changed).tobytes()
    over, rest = np.divmod(gaps, np.iinfo(best).max)
    coded = np.full(len(gaps) + int(over.sum()), np.iinfo(best).max, best)  # the largest: so many are passed over, none changed
    coded[np.cumsum(over + 1) - 1] = rest
    return best, _planes(coded)


def _overwrite(block: Bytes, part: Part) -> None:
    nbytes = part.count * part.itemsize
    inside = 0 <= part.start <= part.start + nbytes <= len(block)
    if part.itemsize not in (1, 2, 4, 8) or part.start % part.itemsize or not inside:
        raise ValueError(f"{part.count} elements of {part.itemsize} bytes at byte {part.start} of a block of {len(block)}")
    target = block[part.start : part.start + nbytes].view(f"u{part.itemsize}")
    raw = _unpack(part.values, nbytes)
    if part.coding == "dense":
        target[:] = raw.view(target.dtype)
        return
    values = _from_planes(raw, target.dtype)
    coded = _unpack(part.positions, nbytes)
    if part.coding == "bitmap":
        target[np.unpackbits(coded, count=part.count).view(bool)] = values
        return
    gaps = _from_planes(coded, np.dtype(part.coding))
    last = np.flatnonzero(gaps != np.iinfo(gaps.dtype).max)
    target[np.cumsum(gaps, dtype=np.int64)[last] + np.arange(len(last))] = values


def _planes(values: np.ndarray) -> bytes:
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _from_planes(raw: Bytes, dtype: "np.dtype[Any]") -> np.ndarray:
    return np.ascontiguousarray(raw.reshape(dtype.itemsize, -1).T).view(dtype).reshape(-1)


def _pack(raw: bytes) -> Packed:
    small = pa.Codec("zstd", compression_level=1).compress(raw, asbytes=True)
    return Packed(len(raw), memoryview(small if len(small) < len(raw) else raw))


def _unpack(packed: Packed, most: int) -> Bytes:
    """Its bytes, of which there are `most` at the most."""
    if not len(packed.data) <= packed.nbytes <= most:
        raise ValueError(f"{len(packed.data)} bytes for {packed.nbytes}, of {most} at the most")
    if len(packed.data) == packed.nbytes:
        return np.frombuffer(packed.data, np.uint8)
    try:
        return np.frombuffer(pa.Codec("zstd").decompress(packed.data, decompressed_size=packed.nbytes), np.uint8)
    except OSError as error:  # what pyarrow raises for damage; any other one is of the memory, and no damage
        raise ValueError(f"zstd: {error}") from error
