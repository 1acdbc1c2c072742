"""From one loss per token to one number: a fixed coefficient per sequence, so that loss = Σ_t coefficient[seq(t)] · loss_t.

The coefficients come from the whole minibatch. A sum over any division into packs is then the same number: how tokens are
packed can't change a step. counts_s [S]: trained tokens of each sequence of the minibatch, all >= 1. Pure.
"""

from collections.abc import Callable
from functools import partial

import torch

from asyncrl.algorithm import AlgorithmSpec

Aggregation = Callable[[torch.Tensor], torch.Tensor]


def token_mean(counts_s: torch.Tensor) -> torch.Tensor:
    """Every token weighs the same (DAPO): 1 / Σ counts."""
    return torch.full_like(counts_s, 1.0 / counts_s.sum().item())


def seq_mean_token_sum(counts_s: torch.Tensor) -> torch.Tensor:
    """Sum over a sequence's tokens, mean over sequences: 1 / S."""
    return torch.full_like(counts_s, 1.0 / len(counts_s))


def seq_mean_token_mean(counts_s: torch.Tensor) -> torch.Tensor:
    """Mean over a sequence's tokens, mean over sequences (GRPO): 1 / (S · count)."""
    return 1.0 / (counts_s * len(counts_s))


def seq_mean_token_sum_norm(counts_s: torch.Tensor, scale: int) -> torch.Tensor:
    """Sum over a sequence's tokens over a constant, mean over sequences: 1 / (S · scale). Dr. GRPO (Liu et al. 2025).

    scale: tokens, usually the longest response; the same in every step, or steps would weigh differently.
    """
    return seq_mean_token_sum(counts_s) / scale


AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-mean": seq_mean_token_mean,
}


def aggregation(spec: AlgorithmSpec) -> Aggregation:
    """The recipe's aggregation."""
    if spec.loss_agg == "seq-mean-token-sum-norm":
        assert spec.loss_scale_factor is not None, "refused when the recipe was made"
        return partial(seq_mean_token_sum_norm, scale=spec.loss_scale_factor)
    return AGGREGATIONS[spec.loss_agg]
