"""Rejection masks: tokens left out of the policy loss because learner and behaviour are too far apart there. Pure.

delta = proximal − behaviour, logprobs of the same token [T]. True: the token stays. Masks combine: a token must pass all. A
masked token counts in the normalizer of the aggregation, as in the papers: masking shrinks a step and never moves weight
onto the tokens that stay. KL and entropy terms still see it.
"""

import torch

from asyncrl.algorithm import AlgorithmSpec
from asyncrl.learn.losses import LOG_RATIO_LIMIT
from asyncrl.learn.sequences import sequence_mean


def icepop(delta_t: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Tokens with low <= exp(delta) <= high. IcePop (Ling team, Ant Group 2025)."""
    ratio_t = delta_t.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return (ratio_t >= low) & (ratio_t <= high)


def geometric(delta_t: torch.Tensor, sequence_t: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Sequences, whole, with low <= exp(mean of delta) <= high: their length makes no difference (Li et al. 2025; verl)."""
    return icepop(sequence_mean(delta_t.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), sequence_t), low, high)


def m2po(delta_m: torch.Tensor, bound: float) -> torch.Tensor:
    """Drops the largest delta² of the minibatch until the mean of the rest is < bound. M2PO (Zheng et al. 2025).

    delta_m [M]: every trained token of the minibatch, not of a pack. Of tokens with equal delta² at the edge all are
    dropped: which of them stay may not hang on their order.
    """
    squared_m = delta_m.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).square()
    ordered_m = squared_m.sort().values
    means_m = ordered_m.cumsum(0) / torch.arange(1, len(ordered_m) + 1, device=delta_m.device)
    stay = int((means_m < bound).sum())  # the mean of the k smallest grows with k
    return torch.ones_like(squared_m, dtype=torch.bool) if stay == len(ordered_m) else squared_m < ordered_m[stay]


def pack_mask(spec: AlgorithmSpec, delta_t: torch.Tensor, sequence_t: torch.Tensor) -> torch.Tensor | None:
    """What of a pack stays by those of the recipe's masks that see a token or a sequence [T] bool; None without any."""
    kept = []
    if "icepop" in spec.masks:
        kept.append(icepop(delta_t, *spec.icepop_bounds))
    if "geometric" in spec.masks:
        kept.append(geometric(delta_t, sequence_t, *spec.geometric_bounds))
    return torch.stack(kept).all(0) if kept else None
