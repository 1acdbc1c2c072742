"""Rankings and preference losses: numbers by hand, a plain float64 form with loops, forward and gradient."""

import itertools
import math
import statistics
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.preferences import desirability, dpo, kto, rank_pairs

#                        group 7: best 0 and 2, worst 1        group 3: 5 above 4   equal        alone
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 4.0, 2.0, 2.0, 9.0], dtype=torch.float64)
GROUPS = torch.tensor([7, 7, 7, 7, 3, 3, 1, 1, 5])


def as_dict(pairs) -> dict[tuple[int, int], float]:
    columns = (pairs.chosen_p.tolist(), pairs.rejected_p.tolist(), pairs.weights_p.tolist())
    return {(chosen, rejected): weight for chosen, rejected, weight in zip(*columns, strict=True)}


def test_best_against_worst_shares_a_groups_weight_among_equals() -> None:
    found = as_dict(rank_pairs(REWARDS, GROUPS, "best_worst"))
    assert found == pytest.approx({(0, 1): 0.25, (2, 1): 0.25, (5, 4): 0.5})


def test_all_pairs_of_different_rewards_weigh_the_same() -> None:
    found = as_dict(rank_pairs(REWARDS, GROUPS, "all"))
    assert found == pytest.approx(dict.fromkeys([(0, 1), (2, 1), (0, 3), (2, 3), (3, 1), (5, 4)], 1 / 6))


@pytest.mark.parametrize("kind", ["best_worst", "all"])
def test_without_a_pair_the_loss_is_nothing_and_has_a_gradient_of_zero(kind: str) -> None:
    h_s = torch.randn(3, dtype=torch.float64, requires_grad=True)
    pairs = rank_pairs(torch.tensor([2.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), kind)
    loss, figures = dpo(h_s, pairs)
    assert (loss.item(), figures) == (0.0, {})
    assert torch.autograd.grad(loss, h_s)[0].tolist() == [0.0, 0.0, 0.0]


def test_dpo_by_hand() -> None:
    h_s = torch.tensor([math.log(3), 0.0, 0.0, 5.0], dtype=torch.float64, requires_grad=True)
    pairs = rank_pairs(torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.zeros(4), "best_worst")
    loss, figures = dpo(h_s, pairs)
    # σ(ln 3) = 3/4 and σ(0) = 1/2, each with weight 1/2.
    assert loss.item() == pytest.approx(0.5 * math.log(4 / 3) + 0.5 * math.log(2))
    (slope_s,) = torch.autograd.grad(loss, h_s)
    assert slope_s.tolist() == pytest.approx([-0.125, 0.375, -0.25, 0.0])  # −w·(1 − σ); the one in the middle is in no pair
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(
        {
            "rewards/chosen": math.log(3) / 2,
            "rewards/rejected": 0.0,
            "rewards/margins": math.log(3) / 2,
            "rewards/accuracies": 0.5,  # a margin of 0 is not right
        }
    )


def test_desirable_is_above_the_groups_mean() -> None:
    assert desirability(REWARDS, GROUPS).tolist() == [1, -1, 1, -1, -1, 1, 0, 0, 0]  # group 7: 0.5 < 0.625


def test_a_reward_that_differs_from_the_mean_by_rounding_is_left_out() -> None:
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.7, 0.7, 0.7], dtype=torch.float64)  # 0.1 + 0.2 + 0.3 = 0.6000000000000001
    assert desirability(rewards, torch.tensor([0, 0, 0, 1, 1, 1])).tolist() == [-1, 0, 1, 0, 0, 0]


def test_kto_by_hand() -> None:
    h_s = torch.tensor([2 * math.log(3), 0.0, math.log(3)], dtype=torch.float64, requires_grad=True)
    loss, figures = kto(h_s, torch.tensor([1, -1, 0]), desirable_weight=1.0, undesirable_weight=2.0)
    # z = mean h = ln 3, the one left out counted in; 1 − σ(ln 3) = 1/4 on either side.
    assert loss.item() == pytest.approx((1 * 0.25 + 2 * 0.25) / 2)
    (slope_s,) = torch.autograd.grad(loss, h_s)
    assert slope_s.tolist() == pytest.approx([-3 / 32, 6 / 32, 0.0])  # λ·σ(1 − σ)/2; z has no gradient
    expected = {"rewards/chosen": 2 * math.log(3), "rewards/rejected": 0.0, "rewards/margins": 2 * math.log(3)}
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected)


def test_the_reference_point_of_kto_is_never_below_zero() -> None:
    h_s = torch.tensor([math.log(3), -5 * math.log(3)], dtype=torch.float64)
    loss, _ = kto(h_s, torch.tensor([1, -1]), desirable_weight=1.0, undesirable_weight=1.0)
    assert loss.item() == pytest.approx((1 / 4 + 1 / (1 + 3**5)) / 2)


def test_kto_without_labels_is_nothing() -> None:
    h_s = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss, figures = kto(h_s, torch.zeros(2, dtype=torch.int64), desirable_weight=1.0, undesirable_weight=1.0)
    assert (loss.item(), figures, torch.autograd.grad(loss, h_s)[0].tolist()) == (0.0, {}, [0.0, 0.0])


# ----------------------------------------------------------------------------------- against a plain form


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain_dpo(h: list[float], rewards: list[float], groups: list[int], kind: str) -> tuple[float, list[float]]:
    """Loss and gradient, group by group, pair by pair."""
    by_group = defaultdict(list)
    for i, group in enumerate(groups):
        by_group[group].append(i)
    weighed = []  # (weight, chosen, rejected)
    for members in by_group.values():
        pairs = [(i, k) for i, k in itertools.permutations(members, 2) if rewards[i] > rewards[k]]
        if kind == "best_worst":
            top, bottom = max(rewards[i] for i in members), min(rewards[i] for i in members)
            pairs = [(i, k) for i, k in pairs if rewards[i] == top and rewards[k] == bottom]
        weighed += [(1 / len(pairs) if kind == "best_worst" else 1.0, i, k) for i, k in pairs]
    total = sum(weight for weight, _, _ in weighed) or 1.0
    loss, slope = 0.0, [0.0] * len(h)
    for weight, i, k in weighed:
        loss -= weight / total * math.log(sigmoid(h[i] - h[k]))
        pull = weight / total * sigmoid(h[k] - h[i])
        slope[i], slope[k] = slope[i] - pull, slope[k] + pull
    return loss, slope


def plain_kto(h: list[float], rewards: list[float], groups: list[int], good: float, bad: float) -> tuple[float, list[float]]:
    z = max(0.0, statistics.fmean(h))
    means = {g: statistics.fmean(r for r, other in zip(rewards, groups, strict=True) if other == g) for g in set(groups)}
    terms = []  # (index, value, slope)
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        if reward > means[group]:
            s = sigmoid(h[i] - z)
            terms.append((i, good * (1 - s), -good * s * (1 - s)))
        elif reward < means[group]:
            s = sigmoid(z - h[i])
            terms.append((i, bad * (1 - s), bad * s * (1 - s)))
    slope = [0.0] * len(h)
    for i, _, pull in terms:
        slope[i] = pull / len(terms)
    return sum(value for _, value, _ in terms) / max(1, len(terms)), slope


ITEMS = st.lists(
    st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 0.25, 1.0, 3.0]), st.integers(0, 3)), min_size=1, max_size=16
)


@pytest.mark.parametrize("kind", ["best_worst", "all", "kto"])
@given(ITEMS, st.randoms())
def test_equals_the_plain_form_whatever_the_order(kind: str, items: list[tuple[float, float, int]], shuffler) -> None:
    for _ in range(2):
        h, rewards, groups = (list(column) for column in zip(*items, strict=True))
        h_s = torch.tensor(h, dtype=torch.float64, requires_grad=True)
        columns = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
        if kind == "kto":
            loss, _ = kto(h_s, desirability(*columns), desirable_weight=1.5, undesirable_weight=0.5)
            expected, slope = plain_kto(h, rewards, groups, 1.5, 0.5)
        else:
            loss, _ = dpo(h_s, rank_pairs(*columns, kind))
            expected, slope = plain_dpo(h, rewards, groups, kind)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.grad(loss, h_s)[0].tolist() == pytest.approx(slope, abs=1e-12)
        shuffler.shuffle(items)
