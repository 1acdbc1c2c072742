"""From logits to tokens. Pure: a token is a function of (seed, position, logits), whoever else is in the batch.

Randomness is counter-based (SplitMix64; Steele, Lea and Flood, OOPSLA 2014): no generator state travels with a rollout,
so a rollout resumed or regenerated elsewhere draws the same numbers. Shapes: n rows, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class RowSampling(NamedTuple):
    """Parameters per row, on the logits' device. The flags spare work that no row needs."""

    temperature: torch.Tensor  # [n] float32, 0 is greedy
    top_p: torch.Tensor  # [n] float32, 1 is off
    top_k: torch.Tensor  # [n] int64, 0 is off
    scaled: bool  # some temperature is not 1
    cut: bool  # some row has top-p or top-k

    @classmethod
    def of(cls, temperature: np.ndarray, top_p: np.ndarray, top_k: np.ndarray, device: torch.device) -> "RowSampling":
        return cls(
            temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
            top_p=torch.tensor(top_p, dtype=torch.float32, device=device),
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device),
            scaled=bool((temperature != 1.0).any()),
            cut=bool((top_p < 1.0).any() or (top_k > 0).any()),
        )


class Sampled(NamedTuple):
    """One token per row."""

    ids: torch.Tensor  # [n] int64
    logprobs: torch.Tensor  # [n] float32 nats, of the distribution sampled from
    # [n] float32, log of the mass that top-k and top-p kept (0 in rows without); None if no row cuts.
    kept_logmass: torch.Tensor | None

    def on_host(self) -> list[np.ndarray]:
        """ids, logprobs and, if there is one, kept_logmass. A device is waited for once; float64 holds all of them exactly."""
        columns = [column for column in self if column is not None]
        return list(torch.stack([column.double() for column in columns]).cpu().numpy())


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer on uint64; wraps around on purpose."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row, float64 [n], from seeds [n] and token positions [n] (int64 or uint64).

    52 bits, so that the product with any total mass rounds to less than that mass: the inverse CDF never falls off the end.
    """
    state = _mix(seeds.astype(np.uint64) + _GAMMA)
    bits = _mix(state + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def kept_tokens(logprobs: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Which tokens survive: mask [n, V] bool, from logprobs [n, V].

    First top-k, then top-p on what is left, renormalized: the smallest set of likeliest tokens whose mass reaches
    top_p, at least one (the order of Hugging Face and vLLM). Among equals, the lower token id goes first.
    """
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    vocabulary = logprobs.shape[-1]
    limit = torch.where(top_k > 0, top_k, vocabulary)[:, None]
    keep = torch.arange(vocabulary, device=logprobs.device)[None, :] < limit
    mass = ranked.exp().masked_fill(~keep, 0.0).cumsum(dim=-1, dtype=torch.float64)
    before = mass.roll(1, dims=-1)
    before[:, 0] = 0.0
    # Compared with an exact 1, rounding in the running sum could cut the tail of a row whose top-p is off.
    keep &= (before < top_p[:, None] * mass[:, -1:]) | (top_p >= 1.0)[:, None]
    return torch.empty_like(keep).scatter_(-1, order, keep)


def sample(logits: torch.Tensor, draws: np.ndarray, rows: RowSampling) -> Sampled:
    """Samples one token per row from logits [n, V] by inverse CDF, in vocabulary order; draws [n] come from `uniforms`.

    Greedy rows take the likeliest token: their distribution is a point mass, so logprob and kept_logmass are 0.
    A row whose logits are not finite has a logprob that is not finite; the caller must check.
    """
    logits = logits.float()
    greedy = rows.temperature == 0.0
    if rows.scaled:
        logits = logits / torch.where(greedy, 1.0, rows.temperature)[:, None]
    logprobs = logits.log_softmax(dim=-1)
    mass, kept = logprobs.exp(), None
    if rows.cut:
        keep = kept_tokens(logprobs, rows.top_p, rows.top_k)
        mass = mass.masked_fill(~keep, 0.0)
        kept = logprobs.masked_fill(~keep, float("-inf")).logsumexp(dim=-1)
        kept = torch.where((rows.top_p < 1.0) | (rows.top_k > 0), kept, 0.0)
    # float32 would lose the tail of a large vocabulary in the running sum.
    cdf = mass.cumsum(dim=-1, dtype=torch.float64)
    target = torch.from_numpy(draws).to(cdf.device)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True).clamp_(max=logits.shape[-1] - 1)
    if rows.scaled:
        ids = torch.where(greedy[:, None], logprobs.argmax(dim=-1, keepdim=True), ids)
    chosen = logprobs.gather(-1, ids)[:, 0]
    if kept is not None:
        chosen = chosen - kept
    if rows.scaled:
        # Times 0, not just 0: NaN logits must stay visible.
        chosen = torch.where(greedy, chosen * 0.0 + 0.0, chosen)
        kept = None if kept is None else torch.where(greedy, 0.0, kept)
    return Sampled(ids[:, 0], chosen, kept)
