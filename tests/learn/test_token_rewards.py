import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learn.batch import make_batch
from asyncrl.learn.batch_metrics import rollout_metrics
from asyncrl.learn.estimators import ESTIMATORS
from asyncrl.learn.token_rewards import credited
from asyncrl.staleness import Staleness

BOUND = Staleness(max_lag=2, batch_groups=2)


@pytest.mark.parametrize(
    ("trained", "earned", "before"),
    [
        ([1, 1, 1, 1], [1, 2, 4, 8], 0),
        ([1, 0, 0, 1], [7, 8], 0),  # what a tool's tokens earned belongs to the token that called it
        ([0, 1, 1, 0], [2, 12], 1),  # a stale token's reward is nobody's; the last one is due after the end of the loss
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


def test_a_batch_by_hand(make_rollout) -> None:
    """Update 7 is past the bound: what its token earned, 1, counts for the rollout and for no token."""
    first = make_rollout(5, 0, updates=(7, 8, 10), reward=3.0, token_rewards=np.array([1.0, 2.0, 4.0]))
    tool = make_rollout(
        5, 1, updates=(9, 9), reward=1.0, loss_mask=np.array([True, False]), token_rewards=np.array([0.5, 0.25])
    )
    old = make_rollout(6, 0, updates=(0, 0), reward=0.0, token_rewards=np.array([1.0, 1.0]))
    plain = make_rollout(6, 1, updates=(10,), reward=6.0)
    batch = make_batch([first, tool, old, plain], BOUND, 10, ESTIMATORS["grpo_no_std"])
    assert batch.outcomes.rewards_s.tolist() == [3.0, 1.0, 0.0, 6.0]
    assert batch.outcomes.shaping_n is not None
    assert batch.outcomes.shaping_n.tolist() == [2.0, 4.0, 0.75, 0.0]
    assert batch.outcomes.before_s is not None
    assert batch.outcomes.before_s.tolist() == [1.0, 0.0, 2.0, 0.0]
    # In all 10 and 1.75, mean 5.875; 2 and 6, mean 4.
    assert batch.advantages_n.tolist() == [4.125, 4.125, -4.125, 2.0]
    assert batch.outcomes.baselines_s is None


def test_remax_by_hand(make_rollout) -> None:
    """Returns 3 + 2 + 4, 3 + 4 against a baseline of 5; 1 against the same; 6 against 8."""
    rollouts = [
        make_rollout(5, 0, updates=(7, 8, 10), reward=3.0, token_rewards=np.array([1.0, 2.0, 4.0]), baseline=5.0),
        make_rollout(5, 1, updates=(9,), reward=1.0, baseline=5.0),
        make_rollout(6, 0, updates=(10,), reward=6.0, baseline=8.0),
    ]
    assert make_batch(rollouts, BOUND, 10, ESTIMATORS["remax"]).advantages_n.tolist() == [4.0, 2.0, -4.0, -2.0]
    figures = rollout_metrics(rollouts)
    assert (figures["reward/mean"], figures["reward/token_sum"]) == pytest.approx((10 / 3, 7 / 3))
    assert figures["reward/baseline"] == 6.5  # of the two prompts
    assert figures["samples"] == 3.0


def test_without_token_rewards_nothing_is_said_of_them(make_rollouts) -> None:
    batch = make_batch(make_rollouts(), BOUND, 0, ESTIMATORS["grpo"])
    assert batch.outcomes.shaping_n is batch.outcomes.before_s is None
    assert not {"reward/token_sum", "reward/baseline"} & rollout_metrics(make_rollouts()).keys()
