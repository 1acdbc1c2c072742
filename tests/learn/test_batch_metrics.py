import numpy as np
import pytest
import torch

from asyncrl.learn.advantages import grpo
from asyncrl.learn.batch import make_batch
from asyncrl.learn.batch_metrics import gap_metrics, rollout_metrics, staleness_metrics
from asyncrl.staleness import Staleness

BOUND = Staleness(max_lag=2, batch_groups=2)


def test_rewards_and_lengths(make_rollout) -> None:
    found = rollout_metrics(
        [
            make_rollout(0, 0, updates=(0,) * 2, reward=1.0, parts={"format": 0.5}),
            make_rollout(0, 1, updates=(0,) * 6, reward=3.0, parts={"format": 1.0}, finish_reason="length"),
        ]
    )
    assert (found["reward/mean"], found["reward/std"], found["reward/format"]) == (2.0, 1.0, 0.75)
    assert (found["response_length/mean"], found["response_length/max"]) == (4.0, 6.0)
    assert found["response_length/clip_ratio"] == 0.5


def test_lag_shares_and_masked_share(make_rollout) -> None:
    rollouts = [make_rollout(0, 0, updates=(3, 4, 5, 5)), make_rollout(0, 1, updates=(2, 1, 1, 1, 1, 1))]
    found = staleness_metrics(rollouts, make_batch(rollouts, BOUND, 5, grpo))
    assert [found[f"staleness/lag_{k}"] for k in range(3)] == [0.5, 0.25, 0.25]
    assert found["staleness/lag_mean"] == 0.75
    assert found["staleness/lag_max"] == 2.0
    assert found["staleness/masked_share"] == pytest.approx(6 / 10)
    assert found["staleness/dispatched_length"] == 5.0
    assert found["staleness/trained_length"] == 4.0


def test_gap_is_taken_on_fresh_tokens_and_k3_on_all(make_rollout) -> None:
    rollouts = [make_rollout(0, 0, updates=(5, 5, 4), logprobs=np.float32([-1, -2, -3]))]
    batch = make_batch(rollouts, BOUND, 5, grpo)
    found = gap_metrics(batch, torch.tensor([-1.1, -1.8, -3.5]))
    assert found["gap/logprob_mean_abs"] == pytest.approx(0.15)
    assert found["gap/logprob_max_abs"] == pytest.approx(0.2)
    assert found["gap/k3"] == pytest.approx(np.mean([np.exp(d) - 1 - d for d in (-0.1, 0.2, -0.5)]), rel=1e-4)


def test_one_absurd_token_does_not_make_the_gap_infinite(make_rollout) -> None:
    batch = make_batch([make_rollout(0, 0, updates=(5,), logprobs=np.float32([-500]))], BOUND, 5, grpo)
    found = gap_metrics(batch, torch.tensor([-1.0]))
    assert found["gap/k3"] == pytest.approx(np.exp(20) - 21, rel=1e-4)
    assert found["gap/logprob_max_abs"] == 499.0


def test_tokens_that_were_not_scored_are_left_out(make_rollout) -> None:
    batch = make_batch([make_rollout(0, 0, updates=(5, 5), logprobs=np.float32([-1, -2]))], BOUND, 5, grpo)
    assert gap_metrics(batch, torch.tensor([float("nan"), -2.5]))["gap/logprob_max_abs"] == pytest.approx(0.5)
    assert gap_metrics(batch, torch.tensor([float("nan")] * 2)) == {}
