"""Per-token estimators of KL(policy ‖ reference), as a loss term or a penalty in the reward; and the coefficient's control.

Flat layout [T]; pure; differentiable in logp_t.

With δ = logp − reference (Schulman, "Approximating KL divergence", 2020): k1 = δ, k2 = δ²/2, k3 = exp(−δ) − 1 + δ.
δ is clamped to ±20: past it a token keeps its value and has no gradient, instead of an overflow. In the loss any of them may
stand; in the reward k1 is the default, whose sum over a response is an unbiased estimate of the KL.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from asyncrl.algorithms.losses import log_ratio

K3_TAIL = 3.0  # nats; k3 is 16.1 there


def k1(logp_t: Tensor, reference_t: Tensor) -> Tensor:
    """Value δ, gradient of k2.

    The own gradient of k1, ∇logp, has expectation zero: as a loss it would pull nowhere. δ·∇logp, the gradient of k2, is
    the unbiased one of the KL on-policy.
    """
    delta_t = log_ratio(logp_t, reference_t)
    squared_t = 0.5 * delta_t.square()
    return delta_t.detach() + squared_t - squared_t.detach()


def k2(logp_t: Tensor, reference_t: Tensor) -> Tensor:
    """δ²/2: biased value, unbiased gradient on-policy."""
    return 0.5 * log_ratio(logp_t, reference_t).square()


def k3(logp_t: Tensor, reference_t: Tensor) -> Tensor:
    """exp(−δ) − 1 + δ: never negative, low variance; GRPO's choice, with its own gradient 1 − exp(−δ).

    Below δ = −3, where the policy has a twentieth of the reference's probability, it goes on as the tangent there: its
    gradient is −19.1, and its value at most 341, where exp would reach 4.85e8 at δ = −20 and one token would be the whole
    batch. verl holds the value at 10 instead (δ < −2.6): the same up to there, but then nothing draws such a token back.
    """
    delta_t = log_ratio(logp_t, reference_t)
    near_t = delta_t.clamp(min=-K3_TAIL)
    return torch.expm1(-near_t) + near_t + math.expm1(K3_TAIL) * (near_t - delta_t)


def k3_unbiased(logp_t: Tensor, reference_t: Tensor, behaviour_t: Tensor) -> Tensor:
    """r·k3, r = exp(logp − behaviour): unbiased for the present policy, whoever sampled. DeepSeek-V3.2 (2025, equation 7); TRL.

    Its gradient, r·δ·∇logp, is that of the KL itself, bounded where a token became rare, as that of k3 is not. It is written
    down, not derived from the value: where one of the two factors is clamped, the other's part would point away.
    """
    ratio_t, delta_t = log_ratio(logp_t.detach(), behaviour_t).exp(), log_ratio(logp_t.detach(), reference_t)
    return ratio_t * (torch.expm1(-delta_t) + delta_t + delta_t * (logp_t - logp_t.detach()))


def token_kl(estimator: str, logp_t: Tensor, reference_t: Tensor, behaviour_t: Tensor) -> Tensor:
    """KL per token [T] by the named estimator; behaviour_t: logprobs of the policy that sampled."""
    if estimator == "k3_unbiased":
        return k3_unbiased(logp_t, reference_t, behaviour_t)
    return KL_ESTIMATORS[estimator](logp_t, reference_t)


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def adapted(coef: float, kl: float, *, target: float, horizon: int, rollouts: int) -> float:
    """The coefficient after a batch whose KL per token was `kl`: β·(1 + clip(kl/target − 1, ±0.2)·rollouts/horizon).

    The controller of Ziegler et al. 2019, in rollouts. Its whole state is the coefficient.
    """
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * rollouts / horizon)
