"""How tensors lie in one flat range of bytes: on the weight bus, and in the memory that SGLang servers map.

Tensors lie one after another in C order, tied ones once. safetensors, whose header says nearly the same, forbids two names
for the same bytes, and checks a header only together with a whole file: here it is checked before any memory is taken.
"""

import itertools
import math
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from msgspec import Struct

from asyncrl.interfaces import Tensors

ALIGN = 64  # bytes: a view of any dtype may start there
PART_BYTES = 16 << 20

# Whole-byte element types. Quantized types carry scales outside their bytes; sub-byte types have no addressable element.
_NAMES = """
    float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
    int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128
"""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES.split()}


class TensorSpec(Struct, frozen=True, array_like=True):
    """Where one tensor lies, and what it is."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # of its first byte, a multiple of ALIGN; tied tensors share it, empty ones have 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def end(self) -> int:
        """The byte behind its last one; 0 if the tensor is empty."""
        return self.offset + self.nbytes if self.nbytes else 0

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor as a view into `flat` (uint8, [total_bytes]), without a copy."""
        return flat[self.offset : self.offset + self.nbytes].view(DTYPES[self.dtype]).reshape(self.shape)


def lay_out(tensors: Tensors) -> tuple[TensorSpec, ...]:
    """Lays tensors out in their order; tied tensors (same memory) are laid out once.

    Raises ValueError for an element type that has no whole-byte representation.
    """
    return lay_out_all(
        (name, tensor.dtype, tensor.shape, (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()))
        for name, tensor in tensors.items()
    )


def lay_out_all(entries: Iterable[tuple[str, torch.dtype, Sequence[int], Hashable]]) -> tuple[TensorSpec, ...]:
    """Lays out what has these names, dtypes and shapes; what has the same identity, which comes last, is laid out once.

    Raises ValueError for an element type that has no whole-byte representation.
    """
    specs: list[TensorSpec] = []
    placed: dict[Hashable, int] = {}
    total = 0
    for name, element, shape, identity in entries:
        dtype = str(element).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"weight {name}: dtype {dtype} can't be sent as plain bytes; send one of {', '.join(DTYPES)}")
        empty = 0 in shape
        offset = 0 if empty else placed.setdefault(identity, -(-total // ALIGN) * ALIGN)
        specs.append(TensorSpec(name, dtype, tuple(shape), offset))
        total = max(total, specs[-1].end)
    return tuple(specs)


def total_bytes(specs: Sequence[TensorSpec]) -> int:
    """How many bytes tensors that lie so take, gaps included."""
    return max((spec.end for spec in specs), default=0)


def parts(spec: TensorSpec, block: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A block of a tensor cut along its first dimension, so that few MiB are cast at a time; before each, its first row."""
    block = block.reshape(block.shape or (1,))
    row_bytes = math.prod(block.shape[1:]) * DTYPES[spec.dtype].itemsize
    rows = max(1, PART_BYTES // row_bytes)
    return zip(range(0, len(block), rows), block.split(rows), strict=True)


def cast(spec: TensorSpec, part: torch.Tensor) -> torch.Tensor:
    """The same on the CPU, contiguous, in the spec's dtype; no copy where it is that already."""
    return part.to(DTYPES[spec.dtype]).cpu().contiguous()


def runs(spec: TensorSpec, part: torch.Tensor, offsets: Sequence[int]) -> Iterator[tuple[int, memoryview]]:
    """Where the bytes of a part go that stands in the whole, of the spec's shape, from `offsets` on. part: from `cast`."""
    strides = [math.prod(spec.shape[dim + 1 :]) * part.itemsize for dim in range(len(spec.shape))]
    start = spec.offset + sum(map(operator.mul, offsets, strides))
    # What it has of the whole's last dimensions lies together there, too, up to the last one of which it has not all.
    cut = max((dim for dim, whole in enumerate(spec.shape) if part.shape[dim] != whole), default=0)
    data = memoryview(part.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # as in models/memory.py
    length = len(data) // math.prod(part.shape[:cut])
    for number, index in enumerate(itertools.product(*map(range, part.shape[:cut]))):
        yield start + sum(map(operator.mul, index, strides)), data[number * length : (number + 1) * length]
