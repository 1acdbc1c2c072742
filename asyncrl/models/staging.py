"""How the ranks of a learner lay a version of its weights into one memory: each its own pieces, a few MiB at a time.

    rank 0            take memory ─► write ─► receive ─► … all have ended ─► seal; it can be published
    of its node         open that ─► write ─► close       nobody waits for anybody
    of other nodes              send, part by part        one rank after the other

With hybrid sharding the first node may have a whole copy of the model; then others send nothing. Where they do, no rank ever
holds a whole tensor, but all bytes come in through rank 0, over the host's network. A publisher on each node, of its own ranks'
pieces, would be faster there.
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist

from asyncrl.errors import Unavailable
from asyncrl.models.layout import DTYPES, TensorSpec, cast, lay_out_all, parts, total_bytes
from asyncrl.models.memory import FlatTensors, Place, WeightMemory, here
from asyncrl.models.pieces import Piece, module_pieces, written
from asyncrl.models.ranks import Ranks


class Staging:
    """A rank's part in staging its model's weights, as often as they change. Names, shapes and ties must not.

    dtype: floating weights are cast to it, but for those that the model keeps in float32 whatever its dtype is (a router's bias
    in GLM and DeepSeek); None: nothing is cast. pieces: what this rank has of the model at a call; on all ranks the same names
    in the same order. where: equal for processes that can open each other's memory. All ranks must make one: they wait for
    each other.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ranks: Ranks | None = None,
        *,
        dtype: torch.dtype | None = None,
        pieces: Callable[[torch.nn.Module, Ranks], Sequence[Piece]] = module_pieces,
        where: str = "",
    ) -> None:
        self._ranks = ranks = ranks or Ranks()
        self._pieces = partial(pieces, model, ranks)
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        layout = lay_out_all((p.name, _sent_as(p, dtype, kept), p.shape, p.name) for p in self._pieces())
        # Where every tensor lies in a version, by name: the same for all versions, and on all ranks.
        self._specs = {spec.name: spec for spec in layout}
        self._nbytes = total_bytes(layout)
        self._far = _other_nodes(where or here(), ranks) if ranks.grouped else []

    def staged(self, what: str, write: Callable[[Place], object] | None = None) -> FlatTensors:
        """All weights as they are now, in new, sealed memory. write: has all ranks `write`; None: this is the only one.

        Raises ConfigError (not enough memory for `what`), ValueError (a dtype without plain bytes), and what `write` raises.
        """
        memory = WeightMemory.create(self._nbytes, what)
        if write is None:
            self._put(memory)
        else:
            write(memory.place)
        memory.seal()
        return FlatTensors(tuple(self._specs.values()), memory)

    def write(self, place: Place) -> None:
        """Writes this rank's pieces into the memory of a version. All ranks must; only other nodes' wait, for the first rank.

        Raises Unavailable if the memory is not there for this process.
        """
        if self._ranks.index in self._far:
            self._send()
            return
        memory = WeightMemory.join(place, self._nbytes)
        if memory is None:
            raise Unavailable(
                f"rank {self._ranks.index}: the memory of a version at {place.path} is gone, or another user's: nothing can be "
                "published; run all ranks as one user, on Linux"
            )
        self._put(memory)
        if self._ranks.first:
            for rank in self._far:
                self._receive(memory, rank)
        memory.close()

    def _own(self) -> Iterator[tuple[TensorSpec, Piece]]:
        """What this rank writes, of tensors that have bytes."""
        for piece in written(self._pieces()):
            if piece.local.numel():
                yield self._specs[piece.name], piece

    def _put(self, memory: WeightMemory) -> None:
        for spec, piece in self._own():
            memory.put(spec, piece.read(), piece.offsets)

    def _send(self) -> None:
        """Sends this rank's pieces to the first one."""
        numbers = {name: number for number, name in enumerate(self._specs)}
        for spec, piece in self._own():
            header, told = self._header(), (numbers[spec.name], len(spec.shape), *piece.offsets, *piece.local.shape)
            header[: len(told)] = torch.tensor(told)
            dist.send(header, 0)
            for _, part in parts(spec, piece.read()):
                dist.send(_bytes(cast(spec, part)), 0)
        dist.send(self._header(), 0)

    def _receive(self, memory: WeightMemory, rank: int) -> None:
        """Writes the pieces that a rank sends."""
        specs, header = list(self._specs.values()), self._header()
        while dist.recv(header, rank) == rank and header[0] >= 0:
            number, count, *rest = header.tolist()
            offsets, shape = rest[:count], rest[count : 2 * count]
            for row, part in parts(specs[number], torch.empty(shape, device="meta")):
                received = torch.empty(part.shape, dtype=DTYPES[specs[number].dtype])
                dist.recv(_bytes(received), rank)
                memory.put_part(specs[number], received, offsets, row)

    def _header(self) -> torch.Tensor:
        """What precedes a piece: the number of its tensor (-1: no more come), its dimensions, its offsets and its shape."""
        return torch.full((2 + 2 * max(len(spec.shape) for spec in self._specs.values()),), -1)


def _sent_as(piece: Piece, dtype: torch.dtype | None, kept: Collection[str]) -> torch.dtype:
    own = piece.local.dtype
    return own if dtype is None or not own.is_floating_point or any(part in piece.name for part in kept) else dtype


def _other_nodes(where: str, ranks: Ranks) -> list[int]:
    """The ranks that are elsewhere than the first one. All must ask."""
    own = torch.tensor([zlib.crc32(where.encode())])
    nodes = [torch.empty_like(own) for _ in range(ranks.layout.ranks)]
    dist.all_gather(nodes, own)
    return [rank for rank, node in enumerate(nodes) if not torch.equal(node, nodes[0])]


def _bytes(part: torch.Tensor) -> torch.Tensor:
    return part.view(-1).view(torch.uint8)
