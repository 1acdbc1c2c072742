"""Rewards on one scale, before the estimator: mean 0 and standard deviation 1, of a batch or of all rollouts so far.

For estimators that don't rescale by themselves, above all with a critic, whose targets then stay in range. `grpo` and the
REINFORCE++ pair undo it: they subtract a mean and divide by a standard deviation of their own. `grpo_no_std`, `rloo` and `opo`
keep the scale, not the shift. What stands beside the reward stays as it is. So the scale also says what a KL in the reward, and
rewards of tokens, weigh against it, whatever the estimator: beside these, it can change which of two rollouts is better.
"""

from typing import Literal

import torch

from asyncrl.learn.token_advantages import WHITEN_EPS, whitened


class RewardNormalizer:
    """`batch`: (r − mean)/std of the batch's rollouts. `running`: of all rollouts so far, this batch's included, in the manner
    of PPO's implementations (OpenRLHF, Stable-Baselines). `none`: rewards as they are. Variances are unbiased.

    state: running count, mean and sum of squared deviations are kept in it, under reward_*: they belong into a checkpoint.
    """

    def __init__(self, kind: Literal["none", "batch", "running"], state: dict[str, float]) -> None:
        self._kind = kind
        self._state = state
        if kind == "running":
            state |= {"reward_count": 0.0, "reward_mean": 0.0, "reward_m2": 0.0}

    def __call__(self, rewards_s: torch.Tensor) -> torch.Tensor:
        """rewards_s [S], of every rollout of a batch; equal ones give 0. Counts them, where it is running."""
        if self._kind == "none" or not len(rewards_s):
            return rewards_s
        if self._kind == "batch":
            return whitened(rewards_s)
        moments = merged(
            (self._state["reward_count"], self._state["reward_mean"], self._state["reward_m2"]),
            (float(len(rewards_s)), float(rewards_s.mean()), float((rewards_s - rewards_s.mean()).square().sum())),
        )
        self._state |= dict(zip(("reward_count", "reward_mean", "reward_m2"), moments, strict=True))
        count, mean, m2 = moments
        return (rewards_s - mean) / (m2 / max(1.0, count - 1) + WHITEN_EPS) ** 0.5


def merged(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float, float]:
    """(count, mean, Σ (x − mean)²) of two sets together, from those of each (Chan, Golub & LeVeque 1983). Not both empty."""
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = first, second
    count, apart = count_a + count_b, mean_b - mean_a
    return count, mean_a + apart * count_b / count, m2_a + m2_b + apart**2 * count_a * count_b / count
