"""Sequence parallel attention (DeepSpeed-Ulysses, Jacobs et al. 2023): ranks that hold tokens swap with those that hold heads.

Everything but attention works token by token, so n ranks can each compute a slice of a pack. For attention they exchange:
each then has all tokens of an n-th of the heads, and afterwards its tokens of all heads again. Every rank of the group must
make the same calls; each waits for all others, in the backward pass as well.
"""

import math

import torch
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd


def to_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, heads, own tokens, dim] to [1, own heads, all tokens, dim], heads and tokens in the order of the ranks.

    Heads of keys and values that the ranks don't divide are repeated until they do.
    """
    count = group.size()
    repeats = math.lcm(key.shape[1], count) // key.shape[1]
    parts = [query, *(tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))]
    by_rank = [tensor[0].unflatten(0, (count, -1)) for tensor in parts]  # [n, own heads, own tokens, dim]
    sizes = [tensor[0].numel() for tensor in by_rank]
    swapped = _exchange(torch.cat([tensor.flatten(1) for tensor in by_rank], dim=1), group).split(sizes, dim=1)
    q, k, v = (
        flat.unflatten(1, tensor.shape[1:]).transpose(0, 1).flatten(1, 2)[None]
        for flat, tensor in zip(swapped, by_rank, strict=True)
    )
    return q, k, v


def to_tokens(output: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """[all tokens, own heads, dim] to [own tokens, all heads, dim]."""
    by_rank = output.unflatten(0, (group.size(), -1))
    return _exchange(by_rank, group).transpose(0, 1).flatten(1, 2)


def _exchange(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Sends tensor[i] to rank i; returns what each rank sent here, in their order."""
    return all_to_all_single_autograd(tensor.contiguous(), None, None, group)
