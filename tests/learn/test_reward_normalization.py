"""Rewards on one scale: by hand, and running moments as if all rewards had come at once."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.reward_normalization import RewardNormalizer, merged
from asyncrl.rundir import RunDir
from asyncrl.types import Version


def column(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float64)


def test_none_leaves_rewards_alone_and_keeps_nothing() -> None:
    state: dict[str, float] = {}
    rewards = column(3.0, 5.0)
    assert RewardNormalizer("none", state)(rewards) is rewards
    assert state == {}


def test_a_batch_by_hand() -> None:
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


def test_the_estimator_sees_normalized_rewards_and_the_log_the_real_ones(make_trainer, make_rollouts) -> None:
    """`grpo_no_std` keeps the scale: advantages are those of rewards divided by the batch's standard deviation."""
    rollouts = make_rollouts()
    spread = statistics.stdev(r.reward for r in rollouts)
    plain, scaled = (
        make_trainer(algorithm={"adv_estimator": "grpo_no_std", "reward_normalization": kind}, learner={"lr": 0.0})
        for kind in ("none", "batch")
    )
    first, second = plain.update(rollouts, 1), scaled.update(rollouts, 1)
    assert second["actor/pg_loss"] == pytest.approx(first["actor/pg_loss"] / spread, rel=1e-5)
    assert second["reward/mean"] == first["reward/mean"] == pytest.approx(statistics.fmean(r.reward for r in rollouts))


def test_running_moments_survive_a_checkpoint_to_the_bit(make_trainer, make_rollouts, tmp_path) -> None:
    algorithm = {"adv_estimator": "rloo", "reward_normalization": "running"}
    going, resumed = make_trainer(algorithm=algorithm, max_lag=9), make_trainer(algorithm=algorithm, max_lag=9)
    going.update(make_rollouts(seed=1), 0)
    checkpoints = Checkpoints(RunDir(tmp_path / "run"), 1)
    checkpoints.save(going.model, going.optimizer, Version(1, 1), going.state)
    resumed.update(make_rollouts(seed=5), 0)  # what a restore must overwrite
    assert checkpoints.restore(resumed.model, resumed.optimizer, state=resumed.state) == 1
    for trainer in (going, resumed):
        trainer.update(make_rollouts(seed=2), 1)
    assert resumed.state == going.state
    assert going.state["reward_count"] == 24
    for a, b in zip(going.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
