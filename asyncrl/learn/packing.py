"""Which sequences share a forward pass. Pure and deterministic."""

from collections.abc import Sequence

import torch

from asyncrl.models.packed import Pack, TokenSequence, input_length, make_pack

CPU_PACK_TOKENS = 2048  # beyond it a CPU only loses its caches (measured: 16,384 is a third slower)


def make_packs(sequences: Sequence[TokenSequence], members: Sequence[int], max_tokens: int, device: torch.device) -> list[Pack]:
    """The sequences with the given indices in packs of at most max_tokens, or what a CPU's caches like, on the device."""
    bound = min(max_tokens, CPU_PACK_TOKENS) if device.type == "cpu" else max_tokens
    return [make_pack(sequences, pack, device) for pack in split_into_packs(sequences, members, bound)]


def split_into_packs(sequences: Sequence[TokenSequence], members: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Divides `members` (indices of `sequences`) into as few packs of at most `max_tokens` computed tokens, evenly filled.

    Sequences with the same shared prefix are neighbours, so that it is computed once; then those of like length, because
    attention is batched by length. A sequence can't be cut: one longer than max_tokens is a pack of its own. For several
    ranks, deal whole groups first and split each rank's share.
    """
    longest: dict[bytes, int] = {}
    prefixes = {i: sequences[i].prefix() for i in members}
    for i in members:
        longest[prefixes[i]] = max(longest.get(prefixes[i], 0), input_length(sequences[i]))
    order = sorted(members, key=lambda i: (longest[prefixes[i]], prefixes[i], input_length(sequences[i]), i))
    costs = []  # per sequence in order: its prefix, and the tokens to compute with and without it
    for i in order:
        length = input_length(sequences[i])
        costs.append((prefixes[i], length, length - sequences[i].shared))
    packs = _fill(costs, max_tokens)
    low, high = 1, max_tokens
    while low < high:  # the smallest bound that needs no further pack: the fullest pack is then as small as possible
        middle = (low + high) // 2
        if len(_fill(costs, middle)) <= len(packs):
            high = middle
        else:
            low = middle + 1
    return [[order[k] for k in pack] for pack in _fill(costs, high)]


def _fill(costs: Sequence[tuple[bytes, int, int]], max_tokens: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room, last = 0, None
    for k, (prefix, whole, own) in enumerate(costs):
        cost = own if packs and prefix == last else whole
        if not packs or cost > room:
            packs.append([])
            room, cost = max_tokens, whole
        packs[-1].append(k)
        room, last = room - cost, prefix
    return packs
