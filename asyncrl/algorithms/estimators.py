"""Advantage estimators by name: from a batch's outcomes to one advantage per trained token. Pure.

Most see rollouts and give every token of one the same; REINFORCE++ and ReMax see tokens, and GAE a critic's values too. The
user's own is named in the recipe as `file.py:name` and is a function of rollouts: `f(rewards_s, groups_s) -> advantages_s`,
all [S], float64.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from asyncrl.algorithms.advantages import (
    WHITEN_EPS,
    GroupEstimator,
    gae,
    grpo,
    grpo_no_std,
    opo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
    whitened,
)
from asyncrl.config.callables import load_callable
from asyncrl.errors import ConfigError


class Outcomes(NamedTuple):
    """What an estimator sees, float64 and on the CPU: S rollouts, trained or not, and N trained tokens of them.

    rewards_s [S], due at a rollout's end; groups_s [S]; lengths_s [S]: tokens that the policy chose; sequence_n [N],
    ascending: each token's rollout; shaping_n [N]: what a token earns beside the reward (its own reward, −β·KL), or None.
    before_s [S]: what tokens earned before the first trained one, or None. earned_s [S]: reward and token rewards in all, or
    None: rounded once, so that what is equal stays equal in any order. baselines_s [S]: what the greedy rollout of the same
    prompt earned in all, or None.
    """

    rewards_s: torch.Tensor
    groups_s: torch.Tensor
    lengths_s: torch.Tensor
    sequence_n: torch.Tensor
    shaping_n: torch.Tensor | None = None
    before_s: torch.Tensor | None = None
    earned_s: torch.Tensor | None = None
    baselines_s: torch.Tensor | None = None

    def shaped_s(self) -> torch.Tensor:
        """Rewards with the sum of what their tokens earned beside [S], as verl has it for estimators of whole rollouts."""
        rewards_s = self.rewards_s if self.before_s is None else self.rewards_s + self.before_s
        return rewards_s if self.shaping_n is None else rewards_s.index_add(0, self.sequence_n, self.shaping_n)

    def ranked_s(self) -> torch.Tensor:
        """What rollouts are ranked by [S]: all that they earned."""
        return self.rewards_s if self.earned_s is None else self.earned_s

    def token_shaping_n(self) -> torch.Tensor:
        """shaping_n [N], zeros where it is None."""
        return self.rewards_s.new_zeros(len(self.sequence_n)) if self.shaping_n is None else self.shaping_n

    def with_shaping(self, added_n: torch.Tensor) -> "Outcomes":
        """Each token earns added_n [N] more."""
        return self._replace(shaping_n=added_n if self.shaping_n is None else self.shaping_n + added_n)


Estimator = Callable[[Outcomes], torch.Tensor]


def per_rollout(function: GroupEstimator) -> Estimator:
    """Makes an estimator of tokens from one of rollouts: each token gets its rollout's advantage."""

    def estimate(outcomes: Outcomes) -> torch.Tensor:
        return function(outcomes.shaped_s(), outcomes.groups_s)[outcomes.sequence_n]

    return estimate


def _opo(outcomes: Outcomes) -> torch.Tensor:
    return opo(outcomes.shaped_s(), outcomes.groups_s, outcomes.lengths_s)[outcomes.sequence_n]


def _reinforce_plus_plus(outcomes: Outcomes) -> torch.Tensor:
    return reinforce_plus_plus(outcomes.rewards_s, outcomes.token_shaping_n(), outcomes.sequence_n)


def _reinforce_plus_plus_baseline(outcomes: Outcomes) -> torch.Tensor:
    return reinforce_plus_plus_baseline(grpo_no_std(outcomes.shaped_s(), outcomes.groups_s), outcomes.sequence_n)


def _unknown(outcomes: Outcomes) -> torch.Tensor:
    """GAE's place until values are known: NaN, so that no step could be made of it unnoticed."""
    return torch.full_like(outcomes.sequence_n, math.nan, dtype=torch.float64)


def gae_advantages(
    outcomes: Outcomes, values_n: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE's advantages, whitened over the batch's tokens, and returns (raw advantage + value) [N] each; as in verl.

    values_n [N] float64: V before each trained token. The reward falls due at a rollout's last *trained* token, what shapes
    it at its own token. Tokens that are not trained (of tools, or too old) are not there: nothing is discounted over them.
    A rollout without a trained token teaches nothing, its reward included.
    """
    earned_n = outcomes.token_shaping_n().clone()
    sequence_n = outcomes.sequence_n
    if len(sequence_n):
        last_n = torch.cat((sequence_n[1:] != sequence_n[:-1], sequence_n.new_ones(1, dtype=torch.bool)))
        earned_n[last_n] += outcomes.rewards_s[sequence_n[last_n]]
    advantages_n, returns_n = gae(earned_n, values_n, sequence_n, gamma=gamma, lam=lam)
    return whitened(advantages_n), returns_n


def _remax(outcomes: Outcomes) -> torch.Tensor:
    if outcomes.baselines_s is None:
        raise ConfigError(
            "algorithm.adv_estimator='remax' on rollouts without a baseline: there is nothing to compare them with; generate "
            "them with replay.plan.Grouping(baseline=True)"
        )
    return remax(outcomes.rewards_s, outcomes.baselines_s, outcomes.token_shaping_n(), outcomes.sequence_n)


ESTIMATORS: dict[str, Estimator] = {
    "grpo": per_rollout(grpo),
    "grpo_no_std": per_rollout(grpo_no_std),
    "dr_grpo": per_rollout(grpo_no_std),
    "rloo": per_rollout(rloo),
    "opo": _opo,
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline,
    "gae": _unknown,
    "remax": _remax,
}


@cache
def estimator(name: str) -> Estimator:
    """A built-in estimator, or the user's. Raises ConfigError where a user's can't be loaded, or (later) gives no [S]."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    function = load_callable(name, "algorithm.adv_estimator")

    def checked(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> torch.Tensor:
        advantages_s = function(rewards_s, groups_s)
        if not isinstance(advantages_s, torch.Tensor) or advantages_s.shape != rewards_s.shape:
            found = tuple(getattr(advantages_s, "shape", ())) or type(advantages_s).__name__
            raise ConfigError(
                f"algorithm.adv_estimator={name!r} returned {found} for {len(rewards_s)} rollouts: their advantages could not "
                f"be told apart; return one per rollout, a tensor of shape {tuple(rewards_s.shape)}"
            )
        return advantages_s

    return per_rollout(checked)


# ------------------------------------------------------------------------------------- token rewards
# Rewards of single tokens, brought to the tokens that are trained. Pure.


def credited(rewards: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, float]:
    """What each trained token of a rollout earned, float64, and what was earned before the first of them.

    rewards [T] float64, due at each response token; trained [T] bool. A reward that is due at a token out of the loss (a
    tool's, or too old) belongs to the last trained token before it: that is the action which it followed. One that no
    trained token precedes is no consequence of any: it counts for the rollout as a whole alone.
    """
    owner = np.cumsum(trained)  # 0: before the first trained token; k: at or after the k-th
    earned = np.bincount(owner, weights=rewards, minlength=int(trained.sum()) + 1)
    return earned[1:], float(earned[0])


# ------------------------------------------------------------------------------ reward normalization
# Rewards on one scale, before the estimator: mean 0 and standard deviation 1, of a batch or of all rollouts so far. For
# estimators that don't rescale by themselves, above all with a critic, whose targets then stay in range. `grpo` and the
# REINFORCE++ pair undo it: they subtract a mean and divide by a standard deviation of their own. `grpo_no_std`, `rloo`
# and `opo` keep the scale, not the shift. What stands beside the reward stays as it is. So the scale also says what a KL
# in the reward, and rewards of tokens, weigh against it, whatever the estimator: beside these, it can change which of two
# rollouts is better.


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
