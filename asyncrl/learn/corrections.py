"""Off-policy corrections: weights for tokens that the proximal policy (start of this update) did not sample itself.

A correction weighs the policy loss per token, without gradient. Flat layout [T]; pure.
proximal_t, behaviour_t: full-softmax logprobs at the sampling temperature, of the same tokens under both policies.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from asyncrl.learn.losses import LOG_RATIO_LIMIT


class Weights(NamedTuple):
    """weights_t [T] multiply the policy loss; capped_t [T] bool: where the weight was truncated."""

    weights_t: torch.Tensor
    capped_t: torch.Tensor


Correction = Callable[[torch.Tensor, torch.Tensor, float], Weights]


def behaviour_ratio(proximal_t: torch.Tensor, behaviour_t: torch.Tensor) -> torch.Tensor:
    """exp(proximal − behaviour) [T], its logarithm clamped to ±20, without gradient."""
    return (proximal_t - behaviour_t).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def decoupled(proximal_t: torch.Tensor, behaviour_t: torch.Tensor, cap: float) -> Weights:
    """min(exp(proximal − behaviour), cap). Decoupled PPO (Hilton et al. 2022), truncated as in AReaL (Fu et al. 2025)."""
    ratio_t = behaviour_ratio(proximal_t, behaviour_t)
    return Weights(ratio_t.clamp(max=cap), ratio_t > cap)


def uncorrected(proximal_t: torch.Tensor, behaviour_t: torch.Tensor, cap: float) -> Weights:
    """1 everywhere: stale tokens are trained as if the proximal policy had sampled them."""
    return Weights(torch.ones_like(proximal_t), torch.zeros_like(proximal_t, dtype=torch.bool))


CORRECTIONS: dict[str, Correction] = {"decoupled": decoupled, "none": uncorrected}
