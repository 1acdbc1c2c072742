"""Sums and means over each sequence of a pack, given back to its tokens. Flat layout [T]; pure; differentiable.

sequence_t [T] int64, in any order: the sequence of each token. A pack holds its sequences whole, so these are those of the
whole sequence, over its trained tokens.
"""

import torch


def sequence_sum(values_t: torch.Tensor, sequence_t: torch.Tensor) -> torch.Tensor:
    """For each token [T], the sum over its sequence."""
    if not len(values_t):
        return values_t
    sums_s = values_t.new_zeros(int(sequence_t.max()) + 1).index_add(0, sequence_t, values_t)
    return sums_s[sequence_t]


def sequence_mean(values_t: torch.Tensor, sequence_t: torch.Tensor) -> torch.Tensor:
    """For each token [T], the mean over its sequence."""
    return sequence_sum(values_t, sequence_t) / sequence_sum(torch.ones_like(values_t), sequence_t)
