"""Packed forward pass: sequences of any length in one row, no padding, no token-by-token mask, shared prompts once.

Everything but attention works token by token, so a pack is one row of tokens, in which the prompt that the rollouts of a
group have in common stands once. Attention lays the sequences out in full (models.attention).
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from asyncrl.models.architectures import PACKED, follows_length, needs_eager
from asyncrl.models.attention import ATTENTION, PackedLayout
from asyncrl.models.logprobs import Head, entropy, sampled_logprobs
from asyncrl.models.ranks import Ranks

log = logging.getLogger(__name__)
Made = TypeVar("Made")


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


class _Rows(NamedTuple):
    """Of scored tokens: logits, what the output layer itself made [T, V], hidden states [T, H]."""

    logits_tv: torch.Tensor
    output_tv: torch.Tensor
    hidden_th: torch.Tensor


class Forward(NamedTuple):
    """What a pass makes for a pack's scored tokens: log-probabilities and entropies [T] in nats, last hidden states [T, H].

    Where several ranks share a pack's tokens, each has the hidden states of its part alone.
    """

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


def part_of(pack: Pack, place: int, count: int) -> Pack:
    """The part of a pack that the rank at `place` computes of the `count` that share its tokens, in the layout of the whole.

    Its tokens are a slice of U, all as long: up to count - 1 tokens are added, one more sequence. Scored are those that it
    predicts; flat_t: where they stand among the T of the whole pack.
    """
    used, laid_out, own = len(pack.input_ids_u), len(pack.expand_s), -(-len(pack.input_ids_u) // count)
    if more := own * count - used:
        new = torch.arange(more, device=pack.input_ids_u.device)
        added = {"input_ids_u": new * 0, "position_ids_u": new, "expand_s": used + new, "collect_u": laid_out + new}
        longer = {name: torch.cat((getattr(pack, name), column)) for name, column in added.items()}
        pack = pack._replace(runs=(*pack.runs, (1, more)), **longer)
    mine = slice(place * own, (place + 1) * own)
    (where_t,) = ((pack.select_t >= mine.start) & (pack.select_t < mine.stop)).nonzero(as_tuple=True)
    return pack._replace(
        input_ids_u=pack.input_ids_u[mine],
        position_ids_u=pack.position_ids_u[mine],
        select_t=pack.select_t[where_t] - mine.start,
        target_ids_t=pack.target_ids_t[where_t],
        flat_t=where_t,
    )


class PackedModel:
    """A causal LM that scores packs. Outside packs the model behaves as with SDPA attention; its weights stay its own.

    ranks: that `shard` has divided the model among. All must make the same calls, each with the packs of its share.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, ranks: Ranks | None = None) -> None:
        self.model = model.eval()  # dropout would make the learner another policy than the generators'
        self.temperature = temperature  # of the sampling: logprobs are taken at it
        self.packs = 0  # that it was given so far
        self.flat = packable(model)  # else one forward per run of equal lengths: exact for every causal LM, but slower
        self.ranks = ranks or Ranks()
        if self.flat:
            model.set_attn_implementation(ATTENTION)
        else:
            log.info("%s is scored by rows of equal length, which is exact, but slower than packed", type(model).__name__)
        self._sharded = isinstance(model, FSDPModule)
        if self._sharded:
            model.asyncrl_run = _call
            register_fsdp_forward_method(model, "asyncrl_run")

    @property
    def device(self) -> torch.device:
        """Where packs must be. (Of a model that is offloaded, not where its weights are.)"""
        weight = next(self.model.parameters())
        return torch.device(weight.device_mesh.device_type) if isinstance(weight, DTensor) else weight.device

    def logprobs(self, pack: Pack) -> torch.Tensor:
        """Log-probabilities [T] of the pack's scored tokens, with gradient."""
        return self.join(self._run(self._logprobs, pack), pack)

    def forward(self, pack: Pack, *, entropy_grad: bool = False) -> Forward:
        """One pass over a pack, with gradient; the entropies have one only if it is asked for."""
        logp_t, entropy_t, hidden_th = self._run(partial(self._forward, entropy_grad=entropy_grad), pack)
        return Forward(self.join(logp_t, pack), self.join(entropy_t, pack), hidden_th)

    def hidden(self, pack: Pack) -> torch.Tensor:
        """The last hidden states [T, H] that predict the pack's scored tokens: what the output layer reads."""
        return self._run(lambda part: self._hidden(part) if self.flat else self._by_rows(part).hidden_th, pack)

    def outputs(self, pack: Pack) -> torch.Tensor:
        """What the output layer itself makes of the hidden states [T, V]: nothing is done with it that is done with logits."""
        layer = self.model.get_output_embeddings()
        return self._run(lambda part: layer(self._hidden(part)) if self.flat else self._by_rows(part).output_tv, pack)

    def join(self, made_t: torch.Tensor, pack: Pack) -> torch.Tensor:
        """What the ranks that share a pack's tokens made of `hidden` or `outputs` [t, …], put together [T, …]."""
        if self.ranks.sp_group is None:
            return made_t
        return self.ranks.whole(made_t, self._part(pack).flat_t, len(pack.flat_t))

    @torch.no_grad()
    def score(self, packs: Sequence[Pack], out_n: torch.Tensor) -> torch.Tensor:
        """Fills and returns out_n [N], NaN so far: the logprobs of the tokens of these and of the other shares' packs."""
        for pack in packs:
            out_n[pack.flat_t] = self.logprobs(pack)
        return self.ranks.merge_(out_n)

    def _part(self, pack: Pack) -> Pack:
        return part_of(pack, self.ranks.place, self.ranks.layout.sp) if self.ranks.sp_group is not None else pack

    def _run(self, compute: Callable[[Pack], Made], pack: Pack) -> Made:
        """compute(this rank's part of the pack), which reads the weights, as a forward pass, for which FSDP gathers them."""
        self.packs += 1
        part = self._part(pack)
        if not self._sharded:
            return compute(part)
        made = self.model.asyncrl_run(compute, part)
        if not torch.is_grad_enabled():  # else the backward pass does it: between passes weights are the sharded ones
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return made

    def _logprobs(self, pack: Pack) -> torch.Tensor:
        if self.flat:
            return Head.of(self.model).logprobs(self._hidden(pack), pack.target_ids_t, self.temperature)
        return sampled_logprobs(self._by_rows(pack).logits_tv, pack.target_ids_t, self.temperature)

    def _forward(self, pack: Pack, entropy_grad: bool) -> Forward:
        if self.flat:
            hidden_th = self._hidden(pack)
            logp_t, entropy_t = Head.of(self.model).scores(hidden_th, pack.target_ids_t, self.temperature)
            return Forward(logp_t, entropy_t if entropy_grad else entropy_t.detach(), hidden_th)
        logits_tv, _, hidden_th = self._by_rows(pack)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
            entropy_t = entropy(logits_tv, self.temperature)
        return Forward(sampled_logprobs(logits_tv, pack.target_ids_t, self.temperature), entropy_t, hidden_th)

    def _hidden(self, pack: Pack) -> torch.Tensor:
        # the 4-D mask tells Hugging Face that masking is taken care of; packed_attention never reads it
        done = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=pack.input_ids_u.device)
        output = self.model.base_model(
            input_ids=pack.input_ids_u[None],
            position_ids=pack.position_ids_u[None],
            attention_mask=done,
            use_cache=False,
            packed_layout=PackedLayout.of(pack.expand_s, pack.collect_u, pack.runs, self.ranks.sp_group),
        )
        return output.last_hidden_state[0, pack.select_t]

    def _by_rows(self, pack: Pack) -> _Rows:
        """Of any causal LM: one forward per run, as equal-length rows.

        Exact, without padding, but more calls. The output layer gets only what predicts scored tokens.
        """
        chosen_t = pack.collect_u[pack.select_t]  # ascending, and so run by run
        rows = chosen_t[:0]  # of the run under way
        made: list[_Rows] = []
        read, output = chosen_t, chosen_t  # by the output layer, in that run

        def choose(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            nonlocal read
            read = inputs[0].flatten(0, -2)[rows]
            return (read[None],)

        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            nonlocal output
            output = made[0]

        layer = self.model.get_output_embeddings()
        hooks = layer.register_forward_pre_hook(choose, prepend=True), layer.register_forward_hook(keep)
        start, ids_s = 0, pack.input_ids_u[pack.expand_s]
        try:
            for count, length in pack.runs:
                end = start + count * length
                rows = chosen_t[(chosen_t >= start) & (chosen_t < end)] - start
                ids = ids_s[start:end].unflatten(0, (count, length))
                # not by calling the model: to FSDP all runs are one forward pass
                logits = self.model.forward(input_ids=ids, use_cache=False).logits[0]
                made.append(_Rows(logits, output, read))
                start = end
        finally:
            for hook in hooks:
                hook.remove()
        return _Rows(*map(torch.cat, zip(*made, strict=True)))


def packable(model: PreTrainedModel) -> bool:
    """Whether this is an architecture, in transformers' own code, of which `packed_attention` is known to be all attention."""
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))  # that FSDP derived its own from
    config, own = model.config.to_dict(), kind.__module__.startswith("transformers.models.")
    return own and config["model_type"] in PACKED and not needs_eager(config) and not follows_length(config)


def _call(compute: Callable[[Pack], Made], pack: Pack) -> Made:
    return compute(pack)
