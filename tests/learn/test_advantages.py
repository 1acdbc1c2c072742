import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learn.advantages import grpo, grpo_no_std, opo, rloo

REWARDS = torch.tensor([1.0, 5.0, 0.0, 2.0, 5.0, 0.5], dtype=torch.float64)
GROUPS = torch.tensor([7, 3, 7, 7, 3, 9])  # 7: 1, 0, 2 with mean 1 and std 1; 3: equal rewards; 9: a group of one
LENGTHS = torch.tensor([1, 4, 1, 2, 9, 3])


def by_group(kind: str, rewards: list[float], groups: list[int], lengths: list[int]) -> list[float]:
    """Each estimator as its paper writes it, one rollout at a time."""
    found = []
    for i, group in enumerate(groups):
        members = [k for k in range(len(groups)) if groups[k] == group]
        own = [rewards[k] for k in members]
        others = [rewards[k] for k in members if k != i]
        if kind == "grpo":
            found.append((rewards[i] - statistics.fmean(own)) / ((statistics.stdev(own) if others else 0.0) + 1e-6))
        elif kind == "grpo_no_std":
            found.append(rewards[i] - statistics.fmean(own))
        elif kind == "rloo":
            found.append(rewards[i] - statistics.fmean(others) if others else 0.0)
        else:
            found.append(rewards[i] - sum(lengths[k] * rewards[k] for k in members) / sum(lengths[k] for k in members))
    return found


ALL = {
    "grpo": lambda rewards, groups, lengths: grpo(rewards, groups),
    "grpo_no_std": lambda rewards, groups, lengths: grpo_no_std(rewards, groups),
    "rloo": lambda rewards, groups, lengths: rloo(rewards, groups),
    "opo": opo,
}


def test_grpo_by_hand() -> None:
    assert grpo(REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -1, 1, 0, 0], abs=2e-6)


def test_without_std_by_hand() -> None:
    assert grpo_no_std(2 * REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -2, 2, 0, 0])


def test_leave_one_out_by_hand() -> None:
    assert rloo(REWARDS, GROUPS).tolist() == pytest.approx([0, 0, -1.5, 1.5, 0, 0])  # 0 − (1 + 2)/2; 2 − (1 + 0)/2


def test_the_optimal_baseline_weighs_by_length() -> None:
    # Group 7: (1·1 + 0·1 + 2·2) / 4 = 1.25.
    assert opo(REWARDS, GROUPS, LENGTHS).tolist() == pytest.approx([-0.25, 0, -1.25, 0.75, 0, 0])


def test_a_group_without_tokens_has_the_plain_mean_and_no_nan() -> None:
    assert opo(REWARDS, GROUPS, torch.zeros(6)).tolist() == pytest.approx(grpo_no_std(REWARDS, GROUPS).tolist())


@pytest.mark.parametrize("kind", ALL)
def test_no_rollouts_at_all(kind: str) -> None:
    nothing = torch.empty(0, dtype=torch.float64)
    assert len(ALL[kind](nothing, nothing.long(), nothing.long())) == 0


@pytest.mark.parametrize("kind", ALL)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-10, 10), st.integers(1, 50)), min_size=1, max_size=20), st.randoms())
def test_equals_the_plain_form_and_order_is_irrelevant(kind: str, items: list[tuple[int, float, int]], shuffler) -> None:
    """Groups are of any size, so this holds for what evictions leave of them as well."""
    groups, rewards, lengths = (list(column) for column in zip(*items, strict=True))
    columns = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), torch.tensor(lengths)
    advantages = ALL[kind](*columns)
    assert advantages.dtype == torch.float64
    # Division by a spread of almost 0 enlarges rounding errors of the mean by 1e6.
    assert advantages.tolist() == pytest.approx(by_group(kind, rewards, groups, lengths), rel=1e-9, abs=1e-7)
    order = list(range(len(items)))
    shuffler.shuffle(order)
    torch.testing.assert_close(ALL[kind](*(c[order] for c in columns)), advantages[order], atol=1e-7, rtol=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_equal_rewards_and_groups_of_one_teach_nothing(kind: str) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.0], dtype=torch.float64)
    found = ALL[kind](rewards, torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 3, 4]))
    assert found.tolist() == pytest.approx([0.0] * 4, abs=1e-9)
