"""Policy losses: one loss per token, before correction weights and aggregation. Flat layout [T]; pure."""

from typing import Protocol

import torch

LOG_RATIO_LIMIT = 20.0  # exp(20) is still finite in float32 after products; beyond it a token has no gradient


class PolicyLoss(Protocol):
    def __call__(
        self, logp_t: torch.Tensor, proximal_t: torch.Tensor, advantages_t: torch.Tensor, *, clip_low: float, clip_high: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss [T], differentiable in logp_t, and which tokens were clipped [T] bool."""


def clipped_ppo(
    logp_t: torch.Tensor, proximal_t: torch.Tensor, advantages_t: torch.Tensor, *, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(−r·A, −clip(r, 1 − clip_low, 1 + clip_high)·A) with r = exp(logp − proximal). PPO (Schulman et al. 2017).

    proximal_t: logprobs under the policy at the start of the update, without gradient. A larger `clip_high` than
    `clip_low` is DAPO's clip-higher. Clipped are the tokens whose clipped term is the larger one: they have no gradient.
    """
    ratio_t = (logp_t - proximal_t).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    free_t = -ratio_t * advantages_t
    held_t = -ratio_t.clamp(1 - clip_low, 1 + clip_high) * advantages_t
    return torch.maximum(free_t, held_t), held_t > free_t


POLICY_LOSSES: dict[str, PolicyLoss] = {"ppo": clipped_ppo}
