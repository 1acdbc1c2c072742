"""Off-policy corrections: weights for tokens that the proximal policy (start of this update) did not sample itself.

A correction weighs the policy loss per token, without gradient. One per recipe, so none is applied twice; masks are another
thing (see `masks`), and combine with it. Flat layout [T]; pure.
proximal_t, behaviour_t: full-softmax logprobs at the sampling temperature, of the same tokens under both policies.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from asyncrl.algorithm import AlgorithmSpec
from asyncrl.learn.losses import LOG_RATIO_LIMIT
from asyncrl.learn.sequences import sequence_sum


class Weights(NamedTuple):
    """weights_t [T] multiply the policy loss; capped_t [T] bool: where the weight was truncated."""

    weights_t: torch.Tensor
    capped_t: torch.Tensor


def behaviour_ratio(proximal_t: torch.Tensor, behaviour_t: torch.Tensor) -> torch.Tensor:
    """exp(proximal − behaviour) [T], its logarithm clamped to ±20, without gradient."""
    return (proximal_t - behaviour_t).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def decoupled(proximal_t: torch.Tensor, behaviour_t: torch.Tensor, cap: float) -> Weights:
    """min(exp(proximal − behaviour), cap). Decoupled PPO (Hilton et al. 2022), truncated as in AReaL (Fu et al. 2025).

    TIS at token level (Yao et al. 2025) is the same weight, by custom with the cap 2.
    """
    ratio_t = behaviour_ratio(proximal_t, behaviour_t)
    return Weights(ratio_t.clamp(max=cap), ratio_t > cap)


def tis_sequence(proximal_t: torch.Tensor, behaviour_t: torch.Tensor, sequence_t: torch.Tensor, cap: float) -> Weights:
    """min(exp(Σ over the sequence of proximal − behaviour), cap), for all its tokens. TIS at sequence level (verl; Liu et
    al. 2025): unbiased for whole answers, at a variance that grows with their length. The sum is over trained tokens."""
    ratio_t = behaviour_ratio(sequence_sum((proximal_t - behaviour_t).detach(), sequence_t), torch.zeros_like(behaviour_t))
    return Weights(ratio_t.clamp(max=cap), ratio_t > cap)


def uncorrected(proximal_t: torch.Tensor) -> Weights:
    """1 everywhere: stale tokens are trained as if the policy that the ratio is taken to had sampled them."""
    return Weights(torch.ones_like(proximal_t), torch.zeros_like(proximal_t, dtype=torch.bool))


def interpolated_proximal(logp_t: torch.Tensor, behaviour_t: torch.Tensor, lag_t: torch.Tensor) -> torch.Tensor:
    """A proximal policy without a forward pass: between behaviour and current logprobs, by lag. A-3PO (Li et al. 2025).

    behaviour + (1 − 1/lag)·(logp − behaviour): the older a token, the nearer to the current policy. Lag 0 and 1: behaviour.
    lag_t [T] in versions. Without gradient.
    """
    share_t = 1 - 1 / lag_t.clamp(min=1).to(logp_t.dtype)
    return behaviour_t + share_t * (logp_t.detach() - behaviour_t)


Correction = Callable[[AlgorithmSpec, torch.Tensor, torch.Tensor, torch.Tensor], Weights]

# (recipe, proximal_t, behaviour_t, sequence_t) -> weights
CORRECTIONS: dict[str, Correction] = {
    "decoupled": lambda spec, proximal_t, behaviour_t, _: decoupled(proximal_t, behaviour_t, spec.behaviour_cap),
    "decoupled_loglinear": lambda spec, proximal_t, behaviour_t, _: decoupled(proximal_t, behaviour_t, spec.behaviour_cap),
    "tis": lambda spec, proximal_t, behaviour_t, _: decoupled(proximal_t, behaviour_t, spec.tis_cap),
    "tis_sequence": lambda spec, proximal_t, behaviour_t, sequence_t: tis_sequence(
        proximal_t, behaviour_t, sequence_t, spec.tis_cap
    ),
    "none": lambda spec, proximal_t, *_: uncorrected(proximal_t),
}
