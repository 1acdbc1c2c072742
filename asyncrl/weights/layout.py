"""The `full` codec: tensors laid out one after another in a flat range of bytes, cut into buckets of equal size.

A bucket border may cut a tensor: buckets bound memory in flight, whatever the sizes of the layers. A codec that sends
less (only changed elements, against a stated base) belongs beside this one and would be named in `Manifest.codec`.
"""

import zlib
from collections.abc import Iterator

import torch

from asyncrl.errors import BadTransfer
from asyncrl.interfaces import Tensors
from asyncrl.weights.messages import Manifest, TensorSpec

ALIGN = 64  # bytes: a view of any dtype may start there

# Whole-byte element types. Quantized types carry scales outside their bytes; sub-byte types have no addressable element.
_NAMES = """
    float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
    int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128
"""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES.split()}


def checksum(data: memoryview) -> int:
    """CRC-32. It guards against damage, not against an enemy: peers are authenticated by CURVE."""
    return zlib.crc32(data)


def plan(tensors: Tensors) -> tuple[tuple[TensorSpec, ...], int]:
    """Lays tensors out in their order. Returns (specs, total bytes). Tied tensors (same memory) are laid out once.

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
            if identity not in placed:
                placed[identity] = -(-total // ALIGN) * ALIGN
                total = placed[identity] + tensor.numel() * tensor.element_size()
            offset = placed[identity]
        specs.append(TensorSpec(name, dtype, shape, offset))
    return tuple(specs), total


def pieces(specs: tuple[TensorSpec, ...], tensors: Tensors) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset, its bytes as a flat uint8 CPU tensor) of every tensor that has bytes; of tied ones the first."""
    end = -1
    for spec in specs:
        tensor = tensors[spec.name]
        if tensor.numel() and spec.offset > end:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            end = spec.offset + data.numel() - 1
            yield spec.offset, data


def as_bytes(data: torch.Tensor) -> memoryview:
    """A flat uint8 CPU tensor as a writable memoryview, without a copy."""
    return memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers before 3.12


def bucket_count(total_bytes: int, bucket_bytes: int) -> int:
    return -(-total_bytes // bucket_bytes)


def bucket_slice(index: int, total_bytes: int, bucket_bytes: int) -> slice:
    return slice(index * bucket_bytes, min((index + 1) * bucket_bytes, total_bytes))


def views(manifest: Manifest, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a manifest as views into `data` (flat uint8, [total_bytes]), without a copy."""
    tensors = {}
    for spec in manifest.tensors:
        raw = data[spec.offset : spec.offset + _size(spec)]
        tensors[spec.name] = raw.view(DTYPES[spec.dtype]).reshape(spec.shape)
    return tensors


def check(manifest: Manifest) -> None:
    """Refuses a manifest that contradicts itself, before any memory is taken for it. Raises BadTransfer."""
    end, names = 0, set()
    for spec in manifest.tensors:
        _require(spec.dtype in DTYPES, manifest, f"{spec.name}: unknown dtype {spec.dtype}")
        _require(spec.name not in names, manifest, f"{spec.name} is named twice")
        _require(min(spec.shape, default=0) >= 0, manifest, f"{spec.name}: negative dimension in {spec.shape}")
        _require(spec.offset >= 0 and spec.offset % ALIGN == 0, manifest, f"{spec.name}: offset {spec.offset}")
        end = max(end, spec.offset + _size(spec) if _size(spec) else 0)
        names.add(spec.name)
    _require(manifest.total_bytes == end, manifest, f"total_bytes={manifest.total_bytes}, its tensors end at {end}")
    _require(manifest.bucket_bytes >= 1, manifest, f"bucket_bytes={manifest.bucket_bytes}")
    buckets = bucket_count(end, manifest.bucket_bytes)
    _require(len(manifest.checksums) == buckets, manifest, f"{len(manifest.checksums)} checksums for {buckets} buckets")


def _size(spec: TensorSpec) -> int:
    count = 1
    for length in spec.shape:
        count *= length
    return count * DTYPES[spec.dtype].itemsize


def _require(condition: bool, manifest: Manifest, message: str) -> None:
    if not condition:
        raise BadTransfer(f"manifest of weights {manifest.version}: {message}; not used")
