"""Policy losses whose ratio is that of a whole sequence. Flat layout [T]; pure; arguments and result as in `losses`.

sequence_t [T]: the sequence of each token. Both papers average over a sequence and then over sequences:
loss_agg="seq-mean-token-mean".
"""

import torch

from asyncrl.learn.losses import Loss, log_ratio
from asyncrl.learn.sequences import sequence_mean


def gspo(
    logp_t: torch.Tensor,
    old_t: torch.Tensor,
    advantages_t: torch.Tensor,
    sequence_t: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """PPO's clip on s = exp(mean of logp − old over the sequence). GSPO (Zheng et al. 2025), its token form:

    every token holds sg(s)·exp(logp − sg(logp)), whose value is s and whose gradient is s·∇logp, so that advantages may
    differ within a sequence. Means move little: bounds are about 3e-4 and 4e-4.
    """
    mean_t = sequence_mean(log_ratio(logp_t.detach(), old_t), sequence_t)
    ratio_t = (mean_t + logp_t - logp_t.detach()).exp()
    free_t = -ratio_t * advantages_t
    held_t = -ratio_t.clamp(1 - clip_low, 1 + clip_high) * advantages_t
    return torch.maximum(free_t, held_t), {"pg_clipfrac": held_t > free_t}


def gmpo(
    logp_t: torch.Tensor,
    old_t: torch.Tensor,
    advantages_t: torch.Tensor,
    sequence_t: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """−A·(geometric mean of the ratios, each clipped in A's direction). GMPO (Zhao et al. 2025); its bounds are ±0.4.

    clip_low and clip_high bound the log-ratio of a token. Every token holds its sequence's loss; A is the sequence's mean.
    pg_clipfrac: tokens whose log-ratio was clipped: they have no gradient.
    """
    free_t = log_ratio(logp_t, old_t)
    held_t = free_t.clamp(-clip_low, clip_high)
    mean_advantage_t = sequence_mean(advantages_t, sequence_t)
    clipped_t = torch.where(advantages_t > 0, held_t < free_t, held_t > free_t) & (advantages_t != 0)
    ratio_t = sequence_mean(torch.where(clipped_t, held_t, free_t), sequence_t).exp()
    return -mean_advantage_t * ratio_t, {"pg_clipfrac": clipped_t}
