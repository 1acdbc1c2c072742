"""Which part of which tensor a rank holds. Nobody is asked: placements tell, without a collective.

What FSDP and tensor parallelism spread over ranks are DTensors; a rank holds one contiguous block of each, possibly an empty
one. Anything else every rank holds whole. A checkpoint, and a version on the bus, are the pieces of all ranks but for copies.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from asyncrl.errors import CheckpointError
from asyncrl.models.ranks import Ranks
from asyncrl.models.stored import StoredTensors


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


@torch.no_grad()
def read_pieces(pieces: Sequence[Piece], stored: StoredTensors, what: str) -> None:
    """Fills this rank's parts with what overlaps them in the files, whatever ranks wrote those. `pieces`: copies included.

    Raises CheckpointError if names or shapes are of another model. what: that they should belong to.
    """
    if differing := {piece.name for piece in pieces} ^ stored.keys():
        examples = f"{len(differing)} names differ, e.g. {sorted(differing)[:3]}"
        raise CheckpointError(f"tensors in {stored.folder} do not belong to this {what}: {examples}")
    for piece in pieces:
        if piece.shape != stored.shapes[piece.name]:
            found = stored.shapes[piece.name]
            raise CheckpointError(f"{piece.name} in {stored.folder}: shape {found}, this {what} has {piece.shape}")
    for piece in pieces:
        stored.read_into(piece.local, piece.name, piece.offsets)


def read_adamw(optimizer: torch.optim.AdamW, module: torch.nn.Module, stored: StoredTensors, ranks: Ranks) -> None:
    """The same for an optimizer's state; parameters that had no step when it was saved have none then."""
    optimizer.state.clear()
    for name, parameter in named_tensors(module).items():
        if f"{name}.step" in stored:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    read_pieces(adamw_pieces(optimizer, module, ranks), stored, "optimizer")


def _piece(name: str, tensor: torch.Tensor, ranks: Ranks) -> Piece:
    whole = tensor.detach()
    if not isinstance(whole, DTensor):
        return Piece(name, whole, tuple(whole.shape), (0,) * whole.dim(), not ranks.leads)
    mesh, placements = whole.device_mesh, whole.placements
    _, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    copy = any(p.is_replicate() and mesh.get_local_rank(dim) for dim, p in enumerate(placements))
    # Of several meshes side by side, which hold the same, only one has the first rank of the group.
    return Piece(name, whole.to_local(), tuple(whole.shape), tuple(offsets), copy or ranks.start not in mesh.mesh)
