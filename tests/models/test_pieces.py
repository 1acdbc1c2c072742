"""What each rank holds of a model and of its optimizer, over real process groups."""

import math

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from asyncrl.config import Layout
from asyncrl.models.pieces import adamw_pieces, module_pieces, named_tensors, written
from asyncrl.models.ranks import Ranks


class Tied(torch.nn.Module):
    """Uneven over two and three ranks, with a tie, a buffer, and a norm smaller than the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 10)
        self.up = torch.nn.Linear(10, 14)
        self.down = torch.nn.Linear(14, 10)
        self.norm = torch.nn.Parameter(torch.arange(1.0))
        self.head = torch.nn.Linear(10, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(3.0))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("passing", torch.zeros(1), persistent=False)


def made(ranks: Ranks) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Tied()
    if ranks.tp_mesh is not None:
        parallelize_module(model, ranks.tp_mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if ranks.fsdp_mesh is not None and ranks.layout.ranks > ranks.layout.tp:
        fully_shard(model, mesh=ranks.fsdp_mesh)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if name != "norm"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * 0.5
    optimizer.step()
    return model, optimizer


def held(ranks: Ranks):
    model, optimizer = made(ranks)
    pieces = [*module_pieces(model, ranks), *adamw_pieces(optimizer, model, ranks)]
    return [piece.name for piece in pieces], [(p.name, p.local.clone(), p.shape, p.offsets) for p in written(pieces)]


def truth() -> dict[str, torch.Tensor]:
    model, optimizer = made(Ranks())
    names = {parameter: name for name, parameter in named_tensors(model).items()}
    state = {f"{names[p]}.{key}": value for p, of in optimizer.state.items() for key, value in of.items()}
    return {name: tensor.detach() for name, tensor in named_tensors(model).items()} | state


def test_one_rank_holds_all_of_its_own_memory() -> None:
    model, optimizer = made(Ranks())
    pieces = [*module_pieces(model, Ranks()), *adamw_pieces(optimizer, model, Ranks())]
    expected = truth()
    assert [piece.name for piece in pieces] == list(expected)
    assert "head.weight" not in expected
    assert "passing" not in expected
    assert "norm.step" not in expected
    assert written(pieces) == pieces
    for piece in pieces:
        assert torch.equal(piece.local, expected[piece.name])
        assert (piece.shape, piece.offsets) == (piece.local.shape, (0,) * piece.local.dim())
    first = next(piece for piece in pieces if piece.name == "embed.weight")
    assert first.local.data_ptr() == model.embed.weight.data_ptr()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(shard=2),
        Layout(shard=3),
        Layout(replicate=2, shard=2),
        Layout(tp=2),
        Layout(shard=2, tp=2),
        Layout(replicate=2, tp=2),
    ],
    ids=["fsdp 2", "fsdp 3", "hsdp 2x2", "tp 2", "fsdp 2 x tp 2", "copies 2 x tp 2"],
)
def test_every_element_is_written_by_one_rank(gang, layout) -> None:
    found = gang(layout, held)
    expected = truth()
    wholes = {name: torch.full(tensor.shape, math.nan) for name, tensor in expected.items()}
    elements = dict.fromkeys(expected, 0)
    for names, pieces in found:
        assert names == list(expected)
        for name, local, shape, offsets in pieces:
            assert shape == tuple(expected[name].shape)
            block = wholes[name]
            for dim, (start, length) in enumerate(zip(offsets, local.shape, strict=True)):
                block = block.narrow(dim, start, length)
            block.copy_(local)
            elements[name] += local.numel()
    for name, tensor in expected.items():
        assert torch.equal(wholes[name], tensor), name
        assert elements[name] == tensor.numel(), name
