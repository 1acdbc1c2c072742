import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.advantages import (
    gae,
    grpo,
    grpo_no_std,
    opo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    returns_to_go,
    rloo,
    whitened,
)

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


# ------------------------------------------------------------------------------------ token advantages
#

Sequences = list[list[tuple[float, float]]]  # (reward, value) per token
SEQUENCES = st.lists(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), max_size=6), max_size=6)


def flat(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and sequence of each token; sequences without tokens leave a gap in the numbers."""
    tokens = [(reward, value, i) for i, sequence in enumerate(sequences) for reward, value in sequence]
    columns = list(zip(*tokens, strict=True)) or [(), (), ()]
    return (
        torch.tensor(columns[0], dtype=torch.float64),
        torch.tensor(columns[1], dtype=torch.float64),
        torch.tensor(columns[2], dtype=torch.int64),
    )


def plain_gae(sequences: Sequences, gamma: float, lam: float) -> list[float]:
    found = []
    for sequence in sequences:
        advantages = []
        following_value = following = 0.0
        for reward, value in reversed(sequence):
            following = reward + gamma * following_value - value + gamma * lam * following
            following_value = value
            advantages.insert(0, following)
        found += advantages
    return found


def test_gae_by_hand() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.tensor([0, 0, 4]), gamma=0.5, lam=0.5)
    # δ = −0.375, 0.75 | 1; A = −0.375 + 0.25·0.75, 0.75 | 1
    assert advantages.tolist() == pytest.approx([-0.1875, 0.75, 1.0])
    assert returns.tolist() == pytest.approx([0.3125, 1.0, 2.0])


@given(SEQUENCES, st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_its_recursion(sequences: Sequences, gamma: float, lam: float) -> None:
    rewards, values, index = flat(sequences)
    advantages, returns = gae(rewards, values, index, gamma=gamma, lam=lam)
    assert advantages.tolist() == pytest.approx(plain_gae(sequences, gamma, lam), abs=1e-9)
    assert returns.tolist() == pytest.approx((advantages + values).tolist())


@given(SEQUENCES)
def test_gae_at_its_ends(sequences: Sequences) -> None:
    """λ = 1, γ = 1: the return minus the value. λ = 0: one step of temporal difference."""
    rewards, values, index = flat(sequences)
    advantages, returns = gae(rewards, values, index, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, returns_to_go(rewards, index))
    torch.testing.assert_close(advantages, returns - values)


@given(SEQUENCES)
def test_returns_are_sums_to_the_end_of_the_own_sequence(sequences: Sequences) -> None:
    rewards, _, index = flat(sequences)
    expected = [sum(reward for reward, _ in sequence[k:]) for sequence in sequences for k in range(len(sequence))]
    assert returns_to_go(rewards, index).tolist() == pytest.approx(expected, abs=1e-9)


def test_whitening_by_hand() -> None:
    assert whitened(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).tolist() == pytest.approx([-1, 0, 1])
    assert whitened(torch.tensor([5.0], dtype=torch.float64)).tolist() == [0.0]
    assert whitened(torch.tensor([0.1] * 7, dtype=torch.float64)).tolist() == pytest.approx([0.0] * 7, abs=1e-9)
    assert len(whitened(torch.empty(0))) == 0


@given(SEQUENCES)
def test_reinforce_plus_plus_equals_its_plain_form(sequences: Sequences) -> None:
    shaping, _, index = flat(sequences)
    ends = torch.tensor([0.5 * i for i in range(len(sequences))], dtype=torch.float64)
    returns = [
        0.5 * i + sum(reward for reward, _ in sequence[k:])
        for i, sequence in enumerate(sequences)
        for k in range(len(sequence))
    ]
    found = reinforce_plus_plus(ends, shaping, index)
    variance = statistics.variance(returns) if len(returns) > 1 else 0.0
    mean = statistics.fmean(returns) if returns else 0.0
    assert found.tolist() == pytest.approx([(r - mean) / (variance + 1e-8) ** 0.5 for r in returns], abs=1e-7)


@given(SEQUENCES, st.floats(-3, 3))
def test_remax_equals_its_dense_form(sequences: Sequences, baseline: float) -> None:
    """verl's layout: rewards in a rectangle, the rollout's own at its last token, summed from the right."""
    shaping, _, index = flat(sequences)
    ends = [0.5 * i for i in range(len(sequences))]
    dense = np.zeros((len(sequences), 7))
    for i, sequence in enumerate(sequences):
        dense[i, : len(sequence)] = [reward for reward, _ in sequence]
        dense[i, max(0, len(sequence) - 1)] += ends[i]
    returns = dense[:, ::-1].cumsum(1)[:, ::-1] - baseline
    expected = [returns[i, t] for i, sequence in enumerate(sequences) for t in range(len(sequence))]
    found = remax(
        torch.tensor(ends, dtype=torch.float64),
        torch.full((len(ends),), baseline, dtype=torch.float64),
        shaping,
        index,
    )
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_the_baseline_form_counts_tokens_not_rollouts() -> None:
    """Centered rewards 1 and −1, on three tokens and one: mean 0.5, variance 1."""
    found = reinforce_plus_plus_baseline(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), torch.tensor([0, 0, 0, 2]))
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5])
