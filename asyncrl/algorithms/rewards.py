"""Rewards as the advantage estimators see them: of rollouts and tokens, assigned to what is trained, on one scale. Pure."""

from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

TIE = 1e-12  # of the sum of a group's |rewards|: so near its mean a reward, in float64, differs by rounding alone

WHITEN_EPS = 1e-8


class Outcomes(NamedTuple):
    """What an estimator sees of a batch, float64 and on the CPU: S rollouts, trained or not, and N trained tokens of them."""

    rewards_s: Tensor  # [S] of whole rollouts; estimators see them normalized where the recipe says so
    groups_s: Tensor  # [S] int64
    lengths_s: Tensor  # [S] int64, tokens that the policy chose, trained or not
    sequence_n: Tensor  # [N] int64, ascending: the rollout of each trained token
    token_rewards_n: Tensor  # [N] turn- and token-level rewards, and the KL penalty in the reward
    before_s: Tensor  # [S] token-level rewards before a rollout's first trained token, which count for the rollout alone
    ranked_s: Tensor  # [S] all rewards of a rollout, rounded once, so that what is equal stays equal in any order
    baselines_s: Tensor | None = None  # [S] all rewards of the greedy rollout of the same prompt; None without those
    values_n: Tensor | None = None  # [N] the critic's value before each trained token; None without a critic
    ends_s: Tensor | None = None  # [S] its value after a rollout that was cut by length, 0 of others; None: not asked for

    def total_s(self) -> Tensor:
        """Rewards with the sum of the token-level ones [S], as verl has it for estimators of whole rollouts."""
        return (self.rewards_s + self.before_s).index_add(0, self.sequence_n, self.token_rewards_n)


def credited(rewards: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, float]:
    """The token-level reward of each trained token of a rollout, float64, and the sum of those before the first of them.

    rewards [T] float64, of each response token; trained [T] bool. The reward of a token out of the loss (a tool's, or too
    old) is assigned to the last trained token before it: that is the action which it followed. One that no trained token
    precedes is no consequence of any: it counts for the rollout as a whole alone.
    """
    owner = np.cumsum(trained)  # 0: before the first trained token; k: at or after the k-th
    earned = np.bincount(owner, weights=rewards, minlength=int(trained.sum()) + 1)
    return earned[1:], float(earned[0])


def centered_in_groups(rewards_s: Tensor, groups_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards minus their group's mean [S], each rollout's group index [S], rollouts per group [G]."""
    _, index_s, count_g = groups_s.unique(return_inverse=True, return_counts=True)
    sum_g = rewards_s.new_zeros(len(count_g)).index_add(0, index_s, rewards_s)
    return rewards_s - (sum_g / count_g)[index_s], index_s, count_g


def whitened(values_n: Tensor) -> Tensor:
    """(x − mean) / sqrt(variance + 1e-8) over all values, variance unbiased. Equal values, or a single one, give 0."""
    centered_n = values_n - values_n.mean()
    variance = centered_n.square().sum() / max(1, len(values_n) - 1)
    return centered_n * (variance + WHITEN_EPS).rsqrt()


class RewardNormalizer:
    """`batch`: (r − mean)/std of the batch's rollouts. `running`: of all rollouts so far, this batch's included, in the manner
    of PPO's implementations (OpenRLHF, Stable-Baselines). `none`: rewards as they are. Variances are unbiased.

    It is for estimators that don't rescale by themselves, above all with a critic, whose targets then stay in range. `grpo`
    and the REINFORCE++ pair undo it: they subtract a mean and divide by a standard deviation of their own. `grpo_no_std`,
    `rloo` and `opo` keep the scale, not the shift. Token-level rewards stay as they are: the scale also says what they, and a
    KL penalty in the reward, weigh against the reward, whatever the estimator, and can change which of two rollouts is better.
    """

    def __init__(self, kind: Literal["none", "batch", "running"], state: dict[str, float]) -> None:
        self._kind = kind
        self._state = state  # running count, mean and sum of squared deviations, as reward_*: they belong into a checkpoint
        if kind == "running":
            state |= {"reward_count": 0.0, "reward_mean": 0.0, "reward_m2": 0.0}

    def __call__(self, rewards_s: Tensor) -> Tensor:
        """rewards_s [S], of every rollout of a batch; equal ones give 0. Counts them, where it is running."""
        if self._kind == "none" or not len(rewards_s):
            return rewards_s
        if self._kind == "batch":
            return whitened(rewards_s)
        count, mean, m2 = merged(
            (self._state["reward_count"], self._state["reward_mean"], self._state["reward_m2"]),
            (float(len(rewards_s)), float(rewards_s.mean()), float((rewards_s - rewards_s.mean()).square().sum())),
        )
        self._state |= {"reward_count": count, "reward_mean": mean, "reward_m2": m2}
        return (rewards_s - mean) / (m2 / max(1.0, count - 1) + WHITEN_EPS) ** 0.5


def merged(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float, float]:
    """(count, mean, Σ (x − mean)²) of two sets together, from those of each (Chan, Golub & LeVeque 1983). Not both empty."""
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = first, second
    count, apart = count_a + count_b, mean_b - mean_a
    return count, mean_a + apart * count_b / count, m2_a + m2_b + apart**2 * count_a * count_b / count
