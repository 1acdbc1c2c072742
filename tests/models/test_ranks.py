"""Who computes what in a group, over real process groups."""

import math

import pytest
import torch

from asyncrl.config import Layout
from asyncrl.models.ranks import Ranks


def place(ranks: Ranks) -> tuple[object, ...]:
    return ranks.index, ranks.share, ranks.place, ranks.fsdp_mesh.shape, ranks.tp_mesh and ranks.tp_mesh.mesh.tolist()


def sums(ranks: Ranks) -> list[float]:
    """Of a column that each share knows one value of, but for the last, which nobody does; and of the indices."""
    column = torch.full((3,), math.nan)
    column[ranks.share] = float(ranks.index)
    return [*ranks.merge_(column).tolist(), ranks.sum_(torch.tensor(float(ranks.index))).item()]


@pytest.mark.parametrize(
    ("layout", "places", "summed"),
    [
        (Layout(shard=2), [(0, 0, 0, (2,), None), (1, 1, 0, (2,), None)], [[0, 1, None, 1]] * 2),
        (Layout(sp=2), [(0, 0, 0, (2,), None), (1, 0, 1, (2,), None)], [[0, None, None, 0]] * 2),
        (
            Layout(shard=2, tp=2),
            [(0, 0, 0, (2,), [0, 1]), (1, 0, 0, (2,), [0, 1]), (2, 1, 0, (2,), [2, 3]), (3, 1, 0, (2,), [2, 3])],
            [[0, 2, None, 2]] * 4,
        ),
        (
            Layout(replicate=2, sp=2),
            [(0, 0, 0, (2, 2), None), (1, 0, 1, (2, 2), None), (2, 1, 0, (2, 2), None), (3, 1, 1, (2, 2), None)],
            [[0, 2, None, 2]] * 4,
        ),
    ],
)
def test_shares_and_sums(gang, layout, places, summed):
    assert gang(layout, place) == places
    found = gang(layout, sums)
    assert [[None if math.isnan(x) else x for x in of_rank] for of_rank in found] == summed


def square(ranks: Ranks) -> tuple[list[float], list[float]]:
    """Of a pack of three, of which the first rank of a share made the middle and the last and the other one the first: all of
    it, and the gradient of each rank's own part of (Σ x)²."""
    where = torch.tensor([[2, 1], [0]][ranks.place])
    part = (where * 10.0 + ranks.share).requires_grad_()
    whole = ranks.whole(part, where, 3)
    whole.sum().square().backward()
    return whole.tolist(), part.grad.tolist()


def test_parts_of_a_pack_make_the_whole_and_get_their_own_gradient(gang):
    first, second = [0.0, 10.0, 20.0], [1.0, 11.0, 21.0]
    assert gang(Layout(shard=2, sp=2), square) == [(first, [60, 60]), (first, [60]), (second, [66, 66]), (second, [66])]


def beside(ranks: Ranks) -> tuple[object, ...]:
    """Where this rank stands among groups; a sum within its own; what each group tells of its models."""
    held = [group for group in ("learner", "critic", "reference") if ranks.holds(group)]
    stands = ranks.index, ranks.start, ranks.count, ranks.share, ranks.place, ranks.leads, ranks.first, held
    summed = ranks.sum_(torch.tensor(1.0 + ranks.index)).item()
    spread = [ranks.spread_(torch.tensor([float(ranks.index)]), group).item() for group in ("learner", "critic", "reference")]
    return *stands, summed, spread, ranks.spread_text("é" * (1 + ranks.index), "critic")


def test_groups_side_by_side_sum_their_own_and_tell_the_others(gang):
    policy, told = ["learner", "reference"], ([0.0, 2.0, 0.0], "ééé")
    assert gang({"learner": Layout(shard=2), "critic": Layout(sp=2)}, beside) == [
        (0, 0, 4, 0, 0, True, True, policy, 3.0, *told),
        (1, 0, 4, 1, 0, False, False, policy, 3.0, *told),
        (2, 2, 4, 0, 0, True, False, ["critic"], 3.0, *told),
        (3, 2, 4, 0, 1, False, False, ["critic"], 3.0, *told),
    ]


def test_the_only_rank_has_no_group():
    ranks = Ranks()
    column = torch.tensor([1.0, math.nan])
    assert (ranks.index, ranks.share, ranks.dealt, ranks.fsdp_mesh, ranks.first) == (0, 0, 1, None, True)
    assert all(map(ranks.holds, ("learner", "critic", "reference")))
    assert ranks.sum_(column) is column
    assert ranks.spread_(column, "critic") is column
    assert ranks.merge_(column) is column
    assert ranks.whole(column, torch.arange(2), 2) is column


def fail(ranks: Ranks) -> None:
    if ranks.index == 1:
        raise ValueError("rank 1 alone")
    ranks.sum_(torch.zeros(1))  # waits for rank 1


def test_an_error_of_one_rank_is_told_and_ends_all(gang):
    with pytest.raises(AssertionError, match=r"rank 1 alone|Connection closed by peer"):
        gang(Layout(shard=2), fail)
