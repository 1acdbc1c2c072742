"""One update's rollouts as flat columns, N trained tokens of S sequences, sequence after sequence; and how they are packed.

A sequence is a segment of a rollout, which most often has only one. Advantages are a rollout's, shared by its segments; so is
what its tokens weigh. What losses and corrections compute over "a sequence" they compute over a segment: one context.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from asyncrl.algorithms.rewards import Outcomes, credited
from asyncrl.config import CPU_PACK_TOKENS
from asyncrl.models.packed import Pack, TokenSequence, input_length, make_pack
from asyncrl.models.ranks import Ranks
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout

ATTENDED = 24_576  # L tokens that attend to each other cost as much as L²/ATTENDED more tokens: 12 × a hidden size of 2,048


class TrainBatch(NamedTuple):
    """What an update learns from, as it was leased: nothing in it comes from the learner's models."""

    sequences: list[TokenSequence]  # those with at least one trained token (S); `scored` are the trained tokens
    rollouts_s: torch.Tensor  # [S] int64, ascending: the rollout of each sequence
    groups: np.ndarray  # [S] int64
    cut: np.ndarray  # [S] bool, ends of responses that were cut by length
    counts_s: torch.Tensor  # [S] float32, trained tokens
    sequence_n: torch.Tensor  # [N] int64
    behaviour_n: torch.Tensor  # [N] float32, full-softmax logprobs of the policy that sampled
    lag_n: torch.Tensor  # [N] int64, versions
    outcomes: Outcomes  # the rewards, of all rollouts; stays on the CPU

    def tokens_of(self, members: Sequence[int]) -> torch.Tensor:
        """Which of the N tokens belong to the sequences with the given indices [M] int64."""
        chosen_s = torch.zeros_like(self.counts_s, dtype=torch.bool)
        chosen_s[members] = True
        return chosen_s[self.sequence_n].nonzero()[:, 0]

    def to(self, device: torch.device) -> "TrainBatch":
        columns = ("rollouts_s", "counts_s", "sequence_n", "behaviour_n", "lag_n")
        return self._replace(**{name: getattr(self, name).to(device) for name in columns})


def make_batch(rollouts: Sequence[TrainRollout], bound: Staleness, committed: int) -> TrainBatch:
    """Columns for update `committed + 1`.

    Advantages see every rollout; tokens are trained where the policy chose them and the bound allows. All
    others stay as context. A rollout without a trained token is left out after its reward has counted.
    """
    trained = [np.asarray(r.loss_mask, dtype=bool) & bound.trainable(r.updates, committed) for r in rollouts]
    parts = [(i, part) for i, r in enumerate(rollouts) for part in segments(r) if trained[i][part].any()]
    counts = torch.tensor([int(trained[i][part].sum()) for i, part in parts], dtype=torch.int64)
    return TrainBatch(
        sequences=[_sequence(rollouts[i], part, trained[i]) for i, part in parts],
        rollouts_s=torch.tensor([i for i, _ in parts], dtype=torch.int64),
        groups=np.array([rollouts[i].group for i, _ in parts], dtype=np.int64),
        cut=np.array([_is_cut(rollouts[i], part) for i, part in parts], dtype=bool),
        counts_s=counts.float(),
        sequence_n=torch.repeat_interleave(torch.arange(len(parts)), counts),
        behaviour_n=_column([behaviour_logprobs(r)[mask] for r, mask in zip(rollouts, trained, strict=True)], np.float32),
        lag_n=_column([committed - r.updates[mask] for r, mask in zip(rollouts, trained, strict=True)], np.int64),
        outcomes=_outcomes(rollouts, trained),
    )


def segments(rollout: TrainRollout) -> list[slice]:
    """Where each segment of the response stands."""
    ends = (*rollout.segments[1:], len(rollout.response_ids))
    return [slice(start, end) for start, end in zip(rollout.segments, ends, strict=True)]


def _is_cut(rollout: TrainRollout, part: slice) -> bool:
    return rollout.finish_reason == "length" and part.stop == len(rollout.response_ids)


def _outcomes(rollouts: Sequence[TrainRollout], trained: Sequence[np.ndarray]) -> Outcomes:
    """The rewards of the rollouts. trained: of each, which of its tokens [T] bool."""
    counts = [int(mask.sum()) for mask in trained]
    earned = [
        (np.zeros(count), 0.0) if r.token_rewards is None else credited(r.token_rewards, mask)
        for r, mask, count in zip(rollouts, trained, counts, strict=True)
    ]
    totals = [math.fsum((r.reward, *(() if r.token_rewards is None else r.token_rewards))) for r in rollouts]
    baselines = [r.baseline for r in rollouts if r.baseline is not None]
    return Outcomes(
        rewards_s=torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
        groups_s=torch.tensor([r.group for r in rollouts], dtype=torch.int64),
        lengths_s=torch.tensor([int(r.loss_mask.sum()) for r in rollouts], dtype=torch.int64),
        sequence_n=torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64)),
        token_rewards_n=_column([rewards_n for rewards_n, _ in earned], np.float64),
        before_s=torch.tensor([before for _, before in earned], dtype=torch.float64),
        ranked_s=torch.tensor(totals, dtype=torch.float64),
        baselines_s=torch.tensor(baselines, dtype=torch.float64) if len(baselines) == len(rollouts) else None,
    )


def _column(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False))


def behaviour_logprobs(rollout: TrainRollout) -> np.ndarray:
    """[T] float32: of the full softmax, also where top-p or top-k cut it before sampling."""
    return rollout.logprobs if rollout.kept_logmass is None else rollout.logprobs + rollout.kept_logmass


def _sequence(rollout: TrainRollout, part: slice, trained: np.ndarray) -> TokenSequence:
    before = rollout.prompt_ids if part.start == 0 else rollout.prompt_ids[:0]  # a later segment's prompt is inside
    ids = np.concatenate((before, rollout.response_ids[part])).astype(np.int64, copy=False)
    own = len(before) if part.start == 0 else int(np.argmax(rollout.loss_mask[part]))
    # The last prompt token predicts the first response token, once per rollout: it is not shared.
    return TokenSequence(ids, np.flatnonzero(trained[part]) + len(before), max(0, own - 1))


def minibatches(groups: np.ndarray, mini_batch_groups: int | None) -> list[list[int]]:
    """Sequence indices per optimizer step: groups in the order they came, `mini_batch_groups` at a time (None: all)."""
    order = {group: rank for rank, group in enumerate(dict.fromkeys(groups.tolist()))}
    size = mini_batch_groups or max(1, len(order))
    parts: list[list[int]] = [[] for _ in range(-(-len(order) // size))]
    for i, group in enumerate(groups.tolist()):
        parts[order[group] // size].append(i)
    return parts


def make_packs(
    sequences: Sequence[TokenSequence], members: Sequence[int], max_tokens: int, device: torch.device, ranks: Ranks
) -> list[Pack]:
    """This share's packs of the sequences with the given indices, of at most max_tokens, or what a CPU's caches like.

    Every share gets as many; one that has fewer gets dummies, which score nothing. No rank waits: all compute the same deal.
    """
    bound = min(max_tokens, CPU_PACK_TOKENS) if device.type == "cpu" else max_tokens
    mine = deal(sequences, members, bound, ranks.dealt)[ranks.share]
    return [make_pack(sequences, pack, device) if pack else dummy_pack(device) for pack in mine]


def dummy_pack(device: torch.device) -> Pack:
    """Two tokens of which none is scored, for a rank that has no pack when others have: a pass is what all ranks make."""
    two, none = torch.arange(2, device=device), torch.arange(0, device=device)
    return Pack(two, two, two, two, ((1, 2),), none, none, none)


def deal(sequences: Sequence[TokenSequence], members: Sequence[int], max_tokens: int, shares: int) -> list[list[list[int]]]:
    """Divides `members` into packs and these into shares, equally many for each; a share's last may be empty.

    The k-th packs of all shares are computed together, and the dearest of them is waited for. So packs are dealt by cost, a
    round at a time: those of a round cost about as much. The dearest come first.
    """
    packs = split_into_packs(sequences, members, max_tokens, shares)
    if shares == 1:
        return [packs]
    packs.sort(key=lambda pack: pack_cost(sequences, pack), reverse=True)
    packs += [[]] * (-len(packs) % shares)
    return [packs[share::shares] for share in range(shares)]


def pack_cost(sequences: Sequence[TokenSequence], pack: Sequence[int]) -> float:
    """What a pack costs, in computed tokens: those that it has, and for attention L²/ATTENDED of each sequence's length L."""
    lengths = [input_length(sequences[i]) for i in pack]
    own = sum(length - sequences[i].shared for i, length in zip(pack, lengths, strict=True))
    prefixes = {sequences[i].prefix(): sequences[i].shared for i in pack}
    return own + sum(prefixes.values()) + sum(length**2 for length in lengths) / ATTENDED


def split_into_packs(
    sequences: Sequence[TokenSequence], members: Sequence[int], max_tokens: int, shares: int = 1
) -> list[list[int]]:
    """Divides `members` (indices of `sequences`) into as few packs of at most `max_tokens` computed tokens, evenly filled.

    Sequences with the same shared prefix are neighbours, so that it is computed once; then those of like length, because
    attention is batched by length. A sequence can't be cut: one longer than max_tokens is a pack of its own. For several
    shares there are as many more packs as they can be dealt, if that makes the fullest smaller: a prompt is then computed
    twice where its rollouts, kept together, would make the others wait for longer.
    """
    lengths = {i: input_length(sequences[i]) for i in members}
    prefixes = {i: sequences[i].prefix() for i in members}
    longest: dict[bytes, int] = {}
    for i in members:
        longest[prefixes[i]] = max(longest.get(prefixes[i], 0), lengths[i])
    order = sorted(members, key=lambda i: (longest[prefixes[i]], prefixes[i], lengths[i], i))
    costs = [(prefixes[i], lengths[i], lengths[i] - sequences[i].shared) for i in order]
    most = -(-len(_fill(costs, max_tokens)) // shares) * shares
    # The smallest bound that needs no further pack: the fullest pack is then as small as possible.
    bound = bisect_left(range(max_tokens), True, lo=1, key=lambda tokens: len(_fill(costs, tokens)) <= most)
    return [[order[k] for k in pack] for pack in _fill(costs, bound)]


def _fill(costs: Sequence[tuple[bytes, int, int]], max_tokens: int) -> list[list[int]]:
    """Packs of neighbours. costs: of each sequence its prefix, and its tokens to compute with and without that."""
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
