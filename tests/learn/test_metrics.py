import numpy as np
import pytest
import torch

from asyncrl.learn.batch import make_batch
from asyncrl.learn.metrics import correction_metrics, gap_metrics, rollout_metrics, staleness_metrics
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
    found = staleness_metrics(rollouts, make_batch(rollouts, BOUND, 5), BOUND, 5)
    assert [found[f"staleness/lag_{k}"] for k in range(3)] == [0.5, 0.25, 0.25]
    assert found["staleness/lag_mean"] == 0.75
    assert found["staleness/lag_max"] == 2.0
    assert found["staleness/masked_share"] == pytest.approx(6 / 10)
    assert found["staleness/dispatched_length"] == 5.0
    assert found["staleness/trained_length"] == 4.0


def test_the_head_of_long_responses_is_counted_by_itself(make_rollout) -> None:
    """Of five rollouts the two longest, of each a quarter: one token of four is trained there, of all tokens nine."""
    long = [make_rollout(0, 0, updates=(1, 1, 5, 5, 5, 5, 5)), make_rollout(0, 1, updates=(2, 3, 5, 5, 5, 5, 5, 5))]
    rollouts = [*(make_rollout(1, i, updates=(2,)) for i in range(3)), *long]
    found = staleness_metrics(rollouts, make_batch(rollouts, BOUND, 5), BOUND, 5)
    assert (found["tokens/head"], found["tokens/head_trained"]) == (4.0, 1.0)
    assert found["staleness/masked_head_share"] == 0.75
    assert found["staleness/masked_share"] == pytest.approx(6 / 18)


def test_gap_is_taken_on_fresh_tokens_and_k3_on_all(make_rollout) -> None:
    rollouts = [make_rollout(0, 0, updates=(5, 5, 4), logprobs=np.float32([-1, -2, -3]))]
    batch = make_batch(rollouts, BOUND, 5)
    found = gap_metrics(batch, torch.tensor([-1.1, -1.8, -3.5]))
    assert found["gap/logprob_mean_abs"] == pytest.approx(0.15)
    assert found["gap/logprob_max_abs"] == pytest.approx(0.2)
    k3 = [np.exp(d) - 1 - d for d in (-0.1, 0.2, -0.5)]
    assert found["gap/k3"] == pytest.approx(np.mean(k3), rel=1e-4)
    assert found["gap/k3_lag_0"] == pytest.approx(np.mean(k3[:2]), rel=1e-4)
    assert found["gap/k3_lag_1"] == pytest.approx(k3[2], rel=1e-4)
    weights = [np.exp(d) for d in (-0.1, 0.2, -0.5)]
    assert found["gap/ess"] == pytest.approx(sum(weights) ** 2 / (3 * sum(w * w for w in weights)), rel=1e-4)


def test_one_absurd_token_does_not_make_the_gap_infinite(make_rollout) -> None:
    batch = make_batch([make_rollout(0, 0, updates=(5,), logprobs=np.float32([-500]))], BOUND, 5)
    found = gap_metrics(batch, torch.tensor([-1.0]))
    assert found["gap/k3"] == pytest.approx(np.exp(3) - 4 + 17 * (np.exp(3) - 1), rel=1e-4)
    assert found["gap/logprob_max_abs"] == 499.0


def test_tokens_that_were_not_scored_are_left_out(make_rollout) -> None:
    batch = make_batch([make_rollout(0, 0, updates=(5, 5), logprobs=np.float32([-1, -2]))], BOUND, 5)
    assert gap_metrics(batch, torch.tensor([float("nan"), -2.5]))["gap/logprob_max_abs"] == pytest.approx(0.5)
    assert gap_metrics(batch, torch.tensor([float("nan")] * 2)) == {}


def test_correction_figures_over_all_tokens_and_by_lag() -> None:
    lag = torch.tensor([0, 0, 2, 2, 2])
    weights = torch.tensor([1.0, 3.0, 5.0, 0.0, float("nan")])  # capped at 5; masked; its step was never made
    capped, masked = torch.tensor([0, 0, 1, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 0]).bool()
    found = correction_metrics(lag, weights, capped, masked)
    assert found["correction/ess"] == pytest.approx(9**2 / (4 * 35))
    assert found["correction/ess_lag_0"] == pytest.approx(16 / (2 * 10))
    assert found["correction/ess_lag_2"] == pytest.approx(25 / (2 * 25))
    assert found["correction/cap_share"] == found["correction/masked_share"] == 0.25
    assert (found["correction/cap_share_lag_0"], found["correction/masked_share_lag_2"]) == (0.0, 0.5)
    assert correction_metrics(lag[:1], torch.zeros(1), capped[:1], ~capped[:1])["correction/ess"] == 0.0
    assert correction_metrics(lag, torch.full((5,), float("nan")), capped, masked) == {}
