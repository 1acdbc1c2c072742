"""Packed forward pass: sequences of any length in one row, no padding, no token-by-token mask, shared prompts once.

Everything but attention works token by token, so a pack is one row of tokens, in which the prompt that the rollouts of a
group have in common stands once. Attention lays the sequences out in full and runs once per *run*, the neighbours of
equal length, as a [count, heads, length, dim] batch with the plain causal kernel. That is exact, linear in the number of
sequences, and as fast for ten thousand responses of ten tokens as for ten of ten thousand.
(Hugging Face's own detection of packs by restarting position ids builds a dense mask with SDPA: quadratic.)
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from asyncrl.errors import ConfigError
from asyncrl.models.architectures import PACKED, follows_length, needs_eager
from asyncrl.models.logprobs import Head, entropy, sampled_logprobs
from asyncrl.models.ranks import Ranks

log = logging.getLogger(__name__)
ATTENTION = "asyncrl_packed"


class TokenSequence(NamedTuple):
    """ids [L] int64: prompt, then response. scored [t] int64, ascending, each >= 1: positions whose logprob is wanted.

    shared: how many leading tokens other sequences of a pack may have in common; fewer than scored[0].
    """

    ids: np.ndarray
    scored: np.ndarray
    shared: int = 0

    def prefix(self) -> bytes:
        """Equal for sequences whose shared tokens are equal."""
        return self.ids[: self.shared].tobytes()


class Pack(NamedTuple):
    """U computed tokens of sequences with S input tokens in all; T scored tokens.

    A sequence's input ends before its last scored token: nothing is predicted from that one. The computed tokens stand in
    sequence order, each shared prefix before the first that has it. expand_s: the computed token of each input token,
    sequences shortest first, end to end. collect_u: one input token for each computed token. runs: (count, length) of
    neighbours of equal length among S. select_t: rows of U that predict the scored tokens; target_ids_t: those tokens.
    flat_t: where each scored token stands in the concatenation of all sequences' scored tokens.
    """

    input_ids_u: torch.Tensor
    position_ids_u: torch.Tensor
    expand_s: torch.Tensor
    collect_u: torch.Tensor
    runs: tuple[tuple[int, int], ...]
    select_t: torch.Tensor
    target_ids_t: torch.Tensor
    flat_t: torch.Tensor


class Forward(NamedTuple):
    """What a pass makes for a pack's scored tokens: log-probabilities and entropies [T] in nats, last hidden states [T, H]."""

    logp_t: torch.Tensor
    entropy_t: torch.Tensor
    hidden_th: torch.Tensor


def input_length(sequence: TokenSequence) -> int:
    """Tokens that the forward pass must read to score this sequence."""
    return int(sequence.scored[-1])


def make_pack(sequences: Sequence[TokenSequence], members: Sequence[int], device: torch.device | str = "cpu") -> Pack:
    """Lays out the sequences with the given indices. Each must have a scored token, none of them within `shared`."""
    flat_starts = np.concatenate(([0], np.cumsum([len(sequence.scored) for sequence in sequences])))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Pack._fields if name != "runs"}
    prefix_starts: dict[bytes, int] = {}
    runs: dict[int, int] = {}  # length -> count; insertion follows the order, shortest first
    computed = laid_out = 0
    for i in sorted(members, key=lambda i: (input_length(sequences[i]), i)):
        ids, scored, shared = sequences[i]
        length = input_length(sequences[i])
        if scored[0] <= shared:
            raise ValueError(f"sequence {i}: nothing of its own predicts position {scored[0]}; every prompt needs a token")
        runs[length] = runs.get(length, 0) + 1
        start = prefix_starts.setdefault(sequences[i].prefix(), computed)
        begin = 0 if start == computed else shared  # a prefix that stands already is not computed again
        own = computed + shared - begin
        columns["input_ids_u"].append(ids[begin:length])
        columns["position_ids_u"].append(np.arange(begin, length))
        columns["collect_u"].append(laid_out + np.arange(begin, length))
        columns["expand_s"] += [start + np.arange(shared), own + np.arange(length - shared)]
        columns["select_t"].append(own + scored - 1 - shared)
        columns["target_ids_t"].append(ids[scored])
        columns["flat_t"].append(np.arange(flat_starts[i], flat_starts[i + 1]))
        computed += length - begin
        laid_out += length
    tensors = {name: torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device) for name, parts in columns.items()}
    return Pack(runs=tuple((count, length) for length, count in runs.items()), **tensors)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_layout: Pack | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each sequence of a pack: query [1, H, U, D] to [1, U, H, D]. Without `packed_layout`, plain SDPA."""
    if packed_layout is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise ConfigError(f"{type(module).__name__} does not hand `packed_layout` to its attention: it can't train packed")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    shares = len(packed_layout.expand_s) > len(packed_layout.input_ids_u)
    sizes = [count * length for count, length in packed_layout.runs]
    # split, not slices: its backward is one concatenation instead of a full-size zero tensor per run
    split = [
        _expand(tensor[0].transpose(0, 1), packed_layout.expand_s if shares else None).split(sizes)
        for tensor in (query, key, value)
    ]
    outputs = []
    for (count, length), *parts in zip(packed_layout.runs, *split, strict=True):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        band = None
        if window is not None and length > window:
            band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=kwargs.get("scaling"), enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _expand(torch.cat(outputs), packed_layout.collect_u if shares else None)[None], None


def _expand(rows: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """rows[index] of [rows, H, D], with the backward pass of an embedding: fast, and in a fixed order where rows repeat."""
    return rows if index is None else F.embedding(index, rows.flatten(1)).unflatten(1, rows.shape[1:])


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class PackedModel:
    """A causal LM that scores packs. Outside packs the model behaves as with SDPA attention; its weights stay its own."""

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.model = model.eval()  # dropout would make the learner another policy than the generators'
        self.temperature = temperature  # of the sampling: logprobs are taken at it
        self.packs = 0  # that it was given so far
        self.flat = _packable(model)  # else one forward per run of equal lengths: exact for every causal LM, but slower
        if self.flat:
            model.set_attn_implementation(ATTENTION)
        else:
            log.info("%s is scored by rows of equal length, which is exact, but slower than packed", type(model).__name__)

    def logprobs(self, pack: Pack) -> torch.Tensor:
        """Log-probabilities [T] of the pack's scored tokens, with gradient."""
        if self.flat:
            return Head.of(self.model).logprobs(self.hidden(pack), pack.target_ids_t, self.temperature)
        return sampled_logprobs(self._by_rows(pack)[0], pack.target_ids_t, self.temperature)

    def forward(self, pack: Pack, *, entropy_grad: bool = False) -> Forward:
        """One pass over a pack, with gradient; the entropies have one only if it is asked for."""
        if self.flat:
            hidden_th = self.hidden(pack)
            logp_t, entropy_t = Head.of(self.model).scores(hidden_th, pack.target_ids_t, self.temperature)
            return Forward(logp_t, entropy_t if entropy_grad else entropy_t.detach(), hidden_th)
        logits_tv, hidden_th = self._by_rows(pack)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
            entropy_t = entropy(logits_tv, self.temperature)
        return Forward(sampled_logprobs(logits_tv, pack.target_ids_t, self.temperature), entropy_t, hidden_th)

    @torch.no_grad()
    def score(self, packs: Sequence[Pack], out_n: torch.Tensor) -> torch.Tensor:
        """Fills and returns out_n [N], NaN so far: the logprobs of the tokens of these and of the other shares' packs."""
        for pack in packs:
            out_n[pack.flat_t] = self.logprobs(pack)
        return self.ranks.merge_(out_n)

    def hidden(self, pack: Pack) -> torch.Tensor:
        """The last hidden states [T, H] that predict the pack's scored tokens: what the output layer reads."""
        if not self.flat:
            return self._by_rows(pack)[1]
        self.packs += 1
        # the 4-D mask tells Hugging Face that masking is taken care of; packed_attention never reads it
        done = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=pack.input_ids_u.device)
        output = self.model.base_model(
            input_ids=pack.input_ids_u[None],
            position_ids=pack.position_ids_u[None],
            attention_mask=done,
            use_cache=False,
            packed_layout=pack,
        )
        return output.last_hidden_state[0, pack.select_t]

    def _by_rows(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] and hidden states [T, H] of any causal LM: one forward per run, as equal-length rows.

        Exact, without padding, but more calls. The output layer gets only what predicts scored tokens.
        """
        self.packs += 1
        chosen_t = pack.collect_u[pack.select_t]  # ascending, and so run by run
        rows = chosen_t[:0]  # of the run under way
        logits: list[torch.Tensor] = []
        read: list[torch.Tensor] = []

        def choose(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            read.append(inputs[0].flatten(0, -2)[rows])
            return (read[-1][None],)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(choose)
        start, ids_s = 0, pack.input_ids_u[pack.expand_s]
        try:
            for count, length in pack.runs:
                end = start + count * length
                rows = chosen_t[(chosen_t >= start) & (chosen_t < end)] - start
                ids = ids_s[start:end].unflatten(0, (count, length))
                logits.append(self.model(input_ids=ids, use_cache=False).logits[0])
                start = end
        finally:
            hook.remove()
        return torch.cat(logits), torch.cat(read)


def _packable(model: PreTrainedModel) -> bool:
    """Whether this is an architecture, in transformers' own code, of which `packed_attention` is known to be all attention."""
    config, own = model.config.to_dict(), type(model).__module__.startswith("transformers.models.")
    return own and config["model_type"] in PACKED and not needs_eager(config) and not follows_length(config)
