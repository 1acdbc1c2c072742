"""Token-level rewards go to trained tokens; rewards on one scale: by hand, and running moments as if all had come at once."""

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.rewards import RewardNormalizer, credited, merged, whitened


@pytest.mark.parametrize(
    ("trained", "earned", "before"),
    [
        ([1, 1, 1, 1], [1, 2, 4, 8], 0),
        ([1, 0, 0, 1], [7, 8], 0),  # what a tool's tokens earned is assigned to the token that called it
        ([0, 1, 1, 0], [2, 12], 1),  # a stale token's reward is nobody's; the last one comes after the end of the loss
        ([0, 0, 0, 0], [], 15),
    ],
)
def test_rewards_go_to_the_last_trained_token_before_them(trained: list[int], earned: list[float], before: float) -> None:
    found, rest = credited(np.array([1.0, 2.0, 4.0, 8.0]), np.array(trained, dtype=bool))
    assert (found.tolist(), rest) == (earned, before)
    assert found.dtype == np.float64


@given(st.lists(st.tuples(st.integers(-64, 64), st.booleans()), max_size=12))
def test_nothing_vanishes(tokens: list[tuple[int, bool]]) -> None:
    rewards = np.array([reward for reward, _ in tokens], dtype=np.float64)
    trained = np.array([mask for _, mask in tokens], dtype=bool)
    earned, before = credited(rewards, trained)
    assert len(earned) == trained.sum()
    assert earned.sum() + before == rewards.sum()
    for k, place in enumerate(np.flatnonzero(trained)):  # returns from a trained token on are those of all tokens
        assert earned[k:].sum() == rewards[place:].sum()


def column(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float64)


def test_none_leaves_rewards_alone_and_keeps_nothing() -> None:
    state: dict[str, float] = {}
    rewards = column(3.0, 5.0)
    assert RewardNormalizer("none", state)(rewards) is rewards
    assert state == {}


def test_reward_normalization_a_batch_by_hand() -> None:
    state: dict[str, float] = {}
    normalized = RewardNormalizer("batch", state)
    assert normalized(column(1.0, 2.0, 3.0)).tolist() == pytest.approx([-1, 0, 1])  # unbiased variance 1
    assert normalized(column(10.0, 30.0)).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])  # knows nothing of the one before
    assert normalized(column(4.0, 4.0)).tolist() == [0, 0]
    assert normalized(column()).tolist() == []
    assert state == {}


def test_running_by_hand() -> None:
    state: dict[str, float] = {}
    normalized = RewardNormalizer("running", state)
    assert normalized(column(1.0, 2.0, 3.0)).tolist() == pytest.approx([-1, 0, 1])  # the first batch: as `batch`
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3.
    assert normalized(column(6.0)).tolist() == pytest.approx([3 / (14 / 3) ** 0.5])
    assert state == pytest.approx({"reward_count": 4, "reward_mean": 3, "reward_m2": 14})
    assert normalized(column()).tolist() == []
    assert state["reward_count"] == 4


def test_equal_rewards_from_the_start_give_zero() -> None:
    normalized = RewardNormalizer("running", {})
    assert normalized(column(4.0)).tolist() == [0]
    assert normalized(column(4.0, 4.0)).tolist() == [0, 0]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=6))
def test_moments_are_those_of_all_rewards_at_once(batches: list[list[float]]) -> None:
    moments = (0.0, 0.0, 0.0)
    for batch in batches:
        mean = statistics.fmean(batch)
        moments = merged(moments, (len(batch), mean, sum((x - mean) ** 2 for x in batch)))
    together = [x for batch in batches for x in batch]
    mean = statistics.fmean(together)
    assert moments == pytest.approx((len(together), mean, sum((x - mean) ** 2 for x in together)), rel=1e-9, abs=1e-6)


def test_whitening_by_hand() -> None:
    assert whitened(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).tolist() == pytest.approx([-1, 0, 1])
    assert whitened(torch.tensor([5.0], dtype=torch.float64)).tolist() == [0.0]
    assert whitened(torch.tensor([0.1] * 7, dtype=torch.float64)).tolist() == pytest.approx([0.0] * 7, abs=1e-9)
    assert len(whitened(torch.empty(0))) == 0
