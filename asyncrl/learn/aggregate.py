"""From one loss per token to one number: a fixed coefficient per sequence, so that loss = Σ_t coefficient[seq(t)] · loss_t.

The coefficients come from the whole minibatch. A sum over any division into packs is then the same number: how tokens are
packed can't change a step. counts_s [S]: trained tokens of each sequence of the minibatch, all >= 1. Pure.
"""

from collections.abc import Callable

import torch

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


AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-mean": seq_mean_token_mean,
}
