"""How tensors lie in one flat range of bytes: on the weight bus, and in the memory that SGLang servers map.

Tensors lie one after another in C order, tied ones once. safetensors, whose header says nearly the same, forbids two names
for the same bytes, and checks a header only together with a whole file: here it is checked before any memory is taken.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from msgspec import Struct

from asyncrl.interfaces import Tensors

ALIGN = 64  # bytes: a view of any dtype may start there

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
    specs: list[TensorSpec] = []
    placed: dict[tuple[object, ...], int] = {}
    total = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"weight {name}: dtype {dtype} can't be sent as plain bytes; send one of {', '.join(DTYPES)}")
        shape = tuple(tensor.shape)
        offset = 0
        if tensor.numel():
            identity = (tensor.data_ptr(), tensor.device, dtype, shape, tensor.stride())
            offset = placed.setdefault(identity, -(-total // ALIGN) * ALIGN)
        specs.append(TensorSpec(name, dtype, shape, offset))
        total = max(total, specs[-1].end)
    return tuple(specs)


def total_bytes(specs: Sequence[TensorSpec]) -> int:
    """How many bytes tensors that lie so take, gaps included."""
    return max((spec.end for spec in specs), default=0)


def pieces(specs: Sequence[TensorSpec], tensors: Tensors) -> Iterator[tuple[int, memoryview]]:
    """Offset and bytes of every tensor that has bytes, copied to the CPU one by one; of tied ones only the first."""
    end = 0
    for spec in specs:
        if spec.end > end:
            end = spec.end
            data = tensors[spec.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield spec.offset, memoryview(data.numpy())
