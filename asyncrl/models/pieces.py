"""Which part of which tensor a rank holds. Nobody is asked: placements tell, without a collective.

What FSDP and tensor parallelism spread over ranks are DTensors; a rank holds one contiguous block of each, possibly an empty
one. Anything else every rank holds whole. A checkpoint, and a version on the bus, are the pieces of all ranks but for copies.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from asyncrl.models.ranks import Ranks


class Piece(NamedTuple):
    """What this rank holds of one tensor: `local` stands in the whole, of `shape`, from `offsets` on.

    local: the memory that is trained, detached, on its device and not necessarily contiguous; copy it before the next step.
    """

    name: str
    local: torch.Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    copy: bool = False  # an earlier rank holds the same, and writes it
    added: Callable[[], torch.Tensor] | None = None  # makes what adapters add to it

    def read(self) -> torch.Tensor:
        """What stands there: `local`; with adapters a new tensor like it (models.lora.merged_pieces says who must read)."""
        return self.local if self.added is None else (self.local + self.added()).to(self.local.dtype)


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, the objects themselves; of tied ones only the first name."""
    first: dict[int, str] = {}
    tensors = module.state_dict(keep_vars=True)  # resharded, where FSDP had gathered them
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)  # not by address: that of every DTensor is 0
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def module_pieces(module: torch.nn.Module, ranks: Ranks) -> list[Piece]:
    """What this rank holds of a module's parameters and persistent buffers, empty blocks and copies included.

    Names, shapes and their order are the same on all ranks.
    """
    return [_piece(name, tensor, ranks) for name, tensor in named_tensors(module).items()]


def adamw_pieces(optimizer: torch.optim.AdamW, module: torch.nn.Module, ranks: Ranks) -> list[Piece]:
    """The same of an optimizer's state: `NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq` of every parameter that had a step."""
    states = optimizer.state
    return [
        _piece(f"{name}.{key}", value, ranks)
        for name, parameter in named_tensors(module).items()
        if parameter in states
        for key, value in states[parameter].items()
    ]


def written(pieces: Iterable[Piece]) -> list[Piece]:
    """Those that this rank writes, where every element is to be written by one rank: neither empty blocks nor copies."""
    return [piece for piece in pieces if not piece.copy and (piece.local.numel() or 0 in piece.shape)]


def _piece(name: str, tensor: torch.Tensor, ranks: Ranks) -> Piece:
    whole = tensor.detach()
    if not isinstance(whole, DTensor):
        return Piece(name, whole, tuple(whole.shape), (0,) * whole.dim(), not ranks.first)
    mesh, placements = whole.device_mesh, whole.placements
    _, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    copy = any(p.is_replicate() and mesh.get_local_rank(dim) for dim, p in enumerate(placements))
    # Of several meshes side by side, which hold the same, only one has the first rank.
    return Piece(name, whole.to_local(), tuple(whole.shape), tuple(offsets), copy or 0 not in mesh.mesh)
