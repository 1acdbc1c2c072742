"""Who computes what in a group, over real process groups."""

import math

import pytest
import torch

from asyncrl.config import Layout
from asyncrl.models.ranks import Ranks


def place(ranks: Ranks) -> tuple[object, ...]:
    return ranks.index, ranks.share, ranks.place, ranks.fsdp_mesh.shape, ranks.tp_mesh and ranks.tp_mesh.mesh.tolist()


def sums(ranks: Ranks) -> list[float]:
    """Of a column that each rank of tokens knows one value of, but for the last, which nobody does; and of the indices."""
    column = torch.full((5,), math.nan)
    column[ranks.share * ranks.layout.sp + ranks.place] = float(ranks.index)
    return [*ranks.merge_(column).tolist(), ranks.sum_(torch.tensor(float(ranks.index))).item()]


@pytest.mark.parametrize(
    ("layout", "places", "summed"),
    [
        (Layout(shard=2), [(0, 0, 0, (2,), None), (1, 1, 0, (2,), None)], [[0, 1, None, None, None, 1]] * 2),
        (Layout(sp=2), [(0, 0, 0, (2,), None), (1, 0, 1, (2,), None)], [[0, 1, None, None, None, 1]] * 2),
        (
            Layout(shard=2, tp=2),
            [(0, 0, 0, (2,), [0, 1]), (1, 0, 0, (2,), [0, 1]), (2, 1, 0, (2,), [2, 3]), (3, 1, 0, (2,), [2, 3])],
            [[0, 2, None, None, None, 2], [1, 3, None, None, None, 4]] * 2,
        ),
        (
            Layout(replicate=2, sp=2),
            [(0, 0, 0, (2, 2), None), (1, 0, 1, (2, 2), None), (2, 1, 0, (2, 2), None), (3, 1, 1, (2, 2), None)],
            [[0, 1, 2, 3, None, 6]] * 4,
        ),
    ],
)
def test_shares_and_sums(gang, layout, places, summed):
    assert gang(layout, place) == places
    found = gang(layout, sums)
    assert [[None if math.isnan(x) else x for x in of_rank] for of_rank in found] == summed


def test_the_only_rank_has_no_group():
    ranks = Ranks()
    column = torch.tensor([1.0, math.nan])
    assert (ranks.index, ranks.share, ranks.dealt, ranks.fsdp_mesh, ranks.first) == (0, 0, 1, None, True)
    assert ranks.sum_(column) is column
    assert ranks.merge_(column) is column


def fail(ranks: Ranks) -> None:
    if ranks.index == 1:
        raise ValueError("rank 1 alone")
    ranks.sum_(torch.zeros(1))  # waits for rank 1


def test_an_error_of_one_rank_is_told_and_ends_all(gang):
    with pytest.raises(AssertionError, match=r"rank 1 alone|Connection closed by peer"):
        gang(Layout(shard=2), fail)
