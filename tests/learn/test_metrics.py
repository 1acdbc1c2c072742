import numpy as np
import pytest
import torch

from asyncrl.learn.batch import make_batch
from asyncrl.learn.metrics import (
    advantage_metrics,
    correction_metrics,
    gap_metrics,
    ratio_metrics,
    rollout_metrics,
    score_metrics,
    staleness_metrics,
)
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
    assert (found["response_length/min"], found["response_length/clip_ratio"]) == (2.0, 0.5)
    assert [found[f"prompt_length/{of}"] for of in ("mean", "max", "min")] == [3.0] * 3
    assert found["perf/total_num_tokens"] == 2 * 3 + 2 + 6


def test_scores_count_all_that_was_earned_and_groups_of_equal_scores_are_told(make_rollout) -> None:
    """Group 0 earned 1 and 1 (one of them by its tokens), group 1 earned 0 and 2, group 2 is alone."""
    rollouts = [
        make_rollout(0, 0, reward=1.0, data_source="a"),
        make_rollout(0, 1, reward=0.5, data_source="a", token_rewards=np.array([0.0, 0.25, 0.25])),
        make_rollout(1, 0, reward=0.0, data_source="b", updates=(0,) * 5),
        make_rollout(1, 1, reward=2.0, data_source="b", finish_reason="length"),
        make_rollout(2, 0, reward=-3.0, data_source="b"),
    ]
    outcomes = make_batch(rollouts, BOUND, 0).outcomes
    found = score_metrics(rollouts, outcomes)
    assert [found[f"critic/score/{of}"] for of in ("mean", "max", "min")] == pytest.approx([0.2, 2.0, -3.0])
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert (found["frac_reward_zero_std/a"], found["frac_reward_zero_std/b"]) == (1.0, pytest.approx(1 / 3))
    assert (found["samples/a"], found["samples/b"]) == (2.0, 3.0)
    assert (found["reward/mean/a"], found["reward/mean/b"]) == (0.75, pytest.approx(-1 / 3))
    assert (found["response_length/mean/a"], found["response_length/mean/b"]) == (3.0, pytest.approx(11 / 3))
    assert (found["response_length/clip_ratio/a"], found["response_length/clip_ratio/b"]) == (0.0, pytest.approx(1 / 3))
    alone = score_metrics(rollouts[2:], make_batch(rollouts[2:], BOUND, 0).outcomes)
    assert {name for name in alone if name.endswith("/b")} == set()  # one source: nothing is said twice
    assert score_metrics([], make_batch([], BOUND, 0).outcomes) == {}


def test_advantages_and_ratios_by_hand() -> None:
    found = advantage_metrics(torch.tensor([1.0, -1.0, 3.0, -3.0]), torch.tensor([0.5, 1.5]))
    assert [found[f"critic/advantages/{of}"] for of in ("mean", "max", "min")] == [0.0, 3.0, -3.0]
    assert found["critic/advantages/std"] == pytest.approx(5**0.5)
    assert [found[f"critic/rewards/{of}"] for of in ("mean", "max", "min")] == [1.0, 1.5, 0.5]
    assert advantage_metrics(torch.tensor([1.0]), None) == advantage_metrics(torch.empty(0), torch.ones(1)) == {}
    nan = float("nan")
    assert ratio_metrics(torch.tensor([1.0, nan, 2.0])) == {"actor/ratio/mean": 1.5, "actor/ratio/max": 2.0}
    assert ratio_metrics(torch.tensor([nan])) == {}


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
