"""A model's weights, of which the first rank of a group has all, and every rank gets its own parts.

    whole = Whole(model, ranks)     the model's parameters go to the meta device; its buffers are the first rank's
    …                               it is divided: parameters become DTensors
    whole.deal(model, device)       memory for a rank's parts, and what belongs there

All ranks must make these calls. No other rank than the first needs memory for more than its parts, and BUCKET_BYTES.
"""

import math
from typing import NamedTuple

import msgspec
import torch
from torch import nn

from asyncrl.errors import ConfigError
from asyncrl.models.layout import DTYPES
from asyncrl.models.pieces import Piece, module_pieces
from asyncrl.models.ranks import Ranks

BUCKET_BYTES = 64 << 20  # that are under way at a time, or one row of a tensor


class _Told(NamedTuple):
    """What the first rank says of a tensor."""

    like: str  # the first name of the same tensor
    shape: tuple[int, ...]
    dtype: str


class Whole:
    """All weights of a model that is about to be divided; held by the first rank alone."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        """Takes them out of the model, which the other ranks may have on the meta device, or with other values and dtypes.

        Raises ConfigError on a rank whose model has other tensors.
        """
        self._ranks = ranks
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
        self._told = self._agree(tensors)
        self._held = {name: tensor.detach() for name, tensor in parameters.items() if ranks.leads}
        for name, told in self._told.items():
            own, dtype = tensors[name], DTYPES[told.dtype]
            if name != told.like:
                tensors[name] = tensors[told.like]
            elif name in parameters:
                tensors[name] = nn.Parameter(torch.empty(told.shape, dtype=dtype, device="meta"), own.requires_grad)
            else:
                tensors[name] = ranks.lead_(own.contiguous() if ranks.leads else torch.empty(told.shape, dtype=dtype))
            _put(model, name, tensors[name])

    @torch.no_grad()
    def deal(self, model: nn.Module, device: str, resting: str) -> None:
        """Gives the ranks their parts, one tensor after the other. device: of the collectives; resting: of the parts."""
        buffers = dict(model.named_buffers(remove_duplicate=False))  # which are where they belong
        model.to_empty(device=resting)
        for name, told in self._told.items():  # what was tied is tied no more
            _put(model, name, buffers[name] if name in buffers else model.get_parameter(told.like))
        for piece in module_pieces(model, self._ranks):
            if piece.name not in buffers:
                self._fill(piece, device)

    def _agree(self, tensors: dict[str, torch.Tensor]) -> dict[str, _Told]:
        """What the first rank says of the model that all make."""
        names = {id(tensor): name for name, tensor in reversed(tensors.items())}
        own = {name: _Told(names[id(t)], tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
        said = self._ranks.lead_text(msgspec.json.encode(own).decode())
        told = msgspec.json.decode(said, type=dict[str, _Told])
        shapes, needed = ({(name, tensor.shape) for name, tensor in of.items()} for of in (own, told))
        if differing := sorted(shapes ^ needed):
            raise ConfigError(
                f"rank {self._ranks.index} makes another model than the first rank, which has its weights: {len(differing)} "
                f"tensors differ, e.g. {differing[:2]}; give all nodes the same files, and the same versions of transformers"
            )
        return told

    def _fill(self, piece: Piece, device: str) -> None:
        """Copies what belongs to this rank out of a tensor that the first one sends to all, some rows at a time."""
        held, own = self._held.pop(piece.name, None), piece.local
        of_row, top = piece.shape[1:], piece.offsets[0]
        columns = tuple(slice(at, at + size) for at, size in zip(piece.offsets[1:], own.shape[1:], strict=True))
        rows = max(1, BUCKET_BYTES // max(1, math.prod(of_row) * own.itemsize))
        for begin in range(0, piece.shape[0], rows):
            end = min(begin + rows, piece.shape[0])
            part = own.new_empty(end - begin, *of_row, device=device) if held is None else held[begin:end].to(device)
            self._ranks.lead_(part)
            first, last = max(begin, top), min(end, top + own.shape[0])
            if first < last:
                own[first - top : last - top].copy_(part[slice(first - begin, last - begin), *columns])


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, tensor)
