"""Tensors in safetensors files, whole or in pieces: which file has which part of which tensor. No torch until one is read.

A file's header tells names, shapes and dtypes. Where it holds pieces, its metadata has `pieces`: by name the shape of the
whole, and where the piece begins in it. A file without that holds whole tensors, as Hugging Face's do.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from asyncrl.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Block(NamedTuple):
    """A part of a tensor, and the file that has it."""

    offsets: Shape
    shape: Shape
    file: Path


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors in a folder's safetensors files; whole ones by name, each read when asked for.

    Raises CheckpointError, naming tensor and file, if one can't be read, or if parts are missing or there twice.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, Shape] = {}  # of the wholes
        self.folder = folder
        self._blocks: dict[str, list[Block]] = {}
        self._reader = cache(lambda file: _open(file, "pt"))
        for file in sorted(folder.glob("*.safetensors")):
            self._index(file)
        for name, blocks in self._blocks.items():
            if problem := _incomplete(self.shapes[name], tuple(blocks)):
                raise CheckpointError(f"{name} in {folder}: {problem}; use an older checkpoint")

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        first, *others = self._blocks[name]
        part = self._reader(first.file).get_tensor(name)
        if not others:
            return part
        whole = torch.empty(self.shapes[name], dtype=part.dtype)
        self.read_into(whole, name, (0,) * whole.dim())
        return whole

    def read_into(self, target: "Tensor", name: str, offsets: Shape) -> None:
        """Fills `target` with the part of a tensor that begins at `offsets`; no more of it is read."""
        for block in self._blocks[name]:
            begins = tuple(map(max, offsets, block.offsets))
            ends = tuple(map(min, _end(offsets, tuple(target.shape)), _end(block.offsets, block.shape)))
            if all(begin < end for begin, end in zip(begins, ends, strict=True)):
                part = self._reader(block.file).get_slice(name)[_slices(begins, ends, block.offsets)]
                target[_slices(begins, ends, offsets)].copy_(part)

    def _index(self, file: Path) -> None:
        header = _open(file, "numpy")
        pieces = json.loads((header.metadata() or {}).get("pieces", "{}"))
        for name in header.keys():  # noqa: SIM118 - it is no dict
            local = tuple(header.get_slice(name).get_shape())
            shape, offsets = map(tuple, pieces.get(name, (local, (0,) * len(local))))
            if self.shapes.setdefault(name, shape) != shape:
                raise CheckpointError(
                    f"{name} has shape {shape} by {file}, but {self.shapes[name]} by {self._blocks[name][0].file}: they are of "
                    "several saves; use an older checkpoint"
                )
            self._blocks.setdefault(name, []).append(Block(offsets, local, file))


def _open(file: Path, framework: str) -> Any:
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}); use an older checkpoint") from error


def _incomplete(shape: Shape, blocks: tuple[Block, ...]) -> str:
    """What is wrong with the parts of a tensor; empty if every element is there once."""
    for one, other in itertools.combinations(blocks, 2):
        begins = map(max, one.offsets, other.offsets)
        ends = map(min, _end(one.offsets, one.shape), _end(other.offsets, other.shape))
        if all(begin < end for begin, end in zip(begins, ends, strict=True)):
            return f"{one.file.name} and {other.file.name} both have a part of it, from {one.offsets} and {other.offsets} on"
    found, wanted = sum(math.prod(block.shape) for block in blocks), math.prod(shape)
    if found == wanted:
        return ""
    files = ", ".join(block.file.name for block in blocks)
    return f"{wanted - found} of {wanted} elements are missing: only {files} have a part of it"


def _end(offsets: Shape, shape: Shape) -> Shape:
    return tuple(map(sum, zip(offsets, shape, strict=True)))


def _slices(begins: Shape, ends: Shape, origin: Shape) -> tuple[slice, ...]:
    return tuple(slice(begin - at, end - at) for begin, end, at in zip(begins, ends, origin, strict=True))
