"""How the ranks of a learner lay a version of its weights into one memory: each its own pieces, a few MiB at a time.

    rank 0            take memory ─► write ─► … all have ended ─► seal; it can be published
    of its node         open that ─► write ─► close      nobody waits for anybody
    of other nodes            send to rank 0, which writes: tensor by tensor

With hybrid sharding the first node may have a whole copy of the model; then others send nothing. Where they do, no rank ever
holds a whole tensor, but all bytes come in through rank 0, over the host's network. A publisher on each node, of its own ranks'
pieces, would be faster there.
"""

import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from asyncrl.errors import Unavailable
from asyncrl.models.layout import DTYPES, cast, lay_out_all, parts, total_bytes
from asyncrl.models.lora import merged_pieces
from asyncrl.models.memory import FlatTensors, Place, WeightMemory, here
from asyncrl.models.pieces import Piece, written
from asyncrl.models.ranks import Ranks


class _Block(NamedTuple):
    """Where a piece stands in its tensor."""

    offsets: list[int]
    shape: list[int]


class Staging:
    """A rank's part in staging its model's weights, as often as they change. Names, shapes and ties must not.

    dtype: floating weights are cast to it, but for those that the model keeps in float32 whatever its dtype is (a router's bias
    in GLM and DeepSeek); None: nothing is cast. where: equal for processes that can open each other's memory. All ranks must
    make one: they wait for each other.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ranks: Ranks | None = None,
        *,
        dtype: torch.dtype | None = None,
        where: str = "",
    ) -> None:
        self._ranks = ranks = ranks or Ranks()
        self._pieces = partial(merged_pieces, model, ranks)
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        own = self._pieces()
        # Where every tensor lies in a version: the same for all versions, and on all ranks.
        self._specs = lay_out_all((piece.name, _sent_as(piece, dtype, kept), piece.shape, piece.name) for piece in own)
        self._far = _elsewhere(where or here(), own, ranks) if ranks.grouped else {}

    def staged(self, what: str, write: Callable[[Place], object] | None = None) -> FlatTensors:
        """All weights as they are now, in new, sealed memory. write: has all ranks `write`; None: this is the only one.

        Raises ConfigError (not enough memory for `what`), ValueError (a dtype without plain bytes), and what `write` raises.
        """
        memory = WeightMemory.create(total_bytes(self._specs), what)
        (write or self.write)(memory.place)
        memory.seal()
        return FlatTensors(self._specs, memory)

    def write(self, place: Place) -> None:
        """Writes this rank's pieces into the memory of a version. All ranks must; only those of several nodes wait.

        Raises Unavailable if the memory is not there for this process.
        """
        if self._ranks.index in self._far:
            self._lay(None)
            return
        memory = WeightMemory.open(place, total_bytes(self._specs), sealed=False)
        if memory is None:
            raise Unavailable(
                f"rank {self._ranks.index}: the memory of a version at {place.path} is gone, or another user's: nothing can be "
                "published; run all ranks as one user"
            )
        self._lay(memory)
        memory.close()

    def _lay(self, memory: WeightMemory | None) -> None:
        """Writes this rank's pieces, or without memory sends them to the first rank, which writes these too."""
        for number, (spec, piece) in enumerate(zip(self._specs, self._pieces(), strict=True)):
            block = piece.read()  # whoever writes it: with adapters all must read
            if _writes(piece):
                if memory is not None:
                    memory.put(spec, block, piece.offsets)
                else:
                    for _, part in parts(spec, block):
                        dist.send(_bytes(cast(spec, part)), 0)
            if memory is not None and self._ranks.first:
                self._receive(memory, number)

    def _receive(self, memory: WeightMemory, number: int) -> None:
        """Writes what ranks of other nodes send of a tensor."""
        spec = self._specs[number]
        for rank, blocks in self._far.items():
            if (block := blocks[number]) is not None:
                for row, part in parts(spec, torch.empty(block.shape, device="meta")):
                    received = torch.empty(part.shape, dtype=DTYPES[spec.dtype])
                    dist.recv(_bytes(received), rank)
                    memory.put_part(spec, received, block.offsets, row)


def _sent_as(piece: Piece, dtype: torch.dtype | None, kept: Collection[str]) -> torch.dtype:
    own = piece.local.dtype
    return own if dtype is None or not own.is_floating_point or any(part in piece.name for part in kept) else dtype


def _writes(piece: Piece) -> bool:
    return bool(written([piece]) and piece.local.numel())


def _elsewhere(where: str, own: Sequence[Piece], ranks: Ranks) -> dict[int, list[_Block | None]]:
    """By rank, of those on other nodes than the first one, what it writes of each tensor. All ranks must ask, together."""
    dims = max(len(piece.shape) for piece in own)
    told = torch.full((1 + len(own), 1 + 2 * dims), -1)
    told[0] = zlib.crc32(where.encode())
    for row, piece in zip(told[1:], own, strict=True):
        if _writes(piece):
            values = (len(piece.shape), *piece.offsets, *piece.local.shape)
            row[: len(values)] = torch.tensor(values)
    tables = [torch.empty_like(told) for _ in range(ranks.layout.ranks)]
    dist.all_gather(tables, told, group=ranks.process_group)
    far = {rank: table[1:].tolist() for rank, table in enumerate(tables) if not torch.equal(table[0], tables[0][0])}
    return {
        rank: [_Block(row[1 : 1 + row[0]], row[1 + row[0] : 1 + 2 * row[0]]) if row[0] >= 0 else None for row in table]
        for rank, table in far.items()
    }


def _bytes(part: torch.Tensor) -> torch.Tensor:
    return part.view(-1).view(torch.uint8)
