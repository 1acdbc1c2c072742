"""Log-probabilities of sampled tokens, in float32 whatever the model's dtype, at the sampling temperature."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from asyncrl.models.footprint import CHUNK_LOGITS, FEWEST_ROWS

# What is done with logits, by `model_type`: a configuration may hold such a field though its model reads none.
_DIVIDED = {"granite", "granitemoe", "granitemoeshared"}  # by `logits_scaling`
_FACTORS = {"cohere": "logit_scale", "cohere2": "logit_scale", "cohere2_moe": "logit_scale", "hyperclovax": "logits_scaling"}
_CAPPED = {"gemma3_text", "gemma3n_text", "gemma4_text", "nanochat"}  # at `final_logit_softcapping`

Scores = tuple[Tensor, Tensor]  # log-probabilities of the tokens, entropies of the distributions [T], in nats


def _scaled(logits_tv: Tensor, temperature: float) -> Tensor:
    logits = logits_tv.float() if logits_tv.dtype in (torch.bfloat16, torch.float16) else logits_tv
    return logits if temperature == 1.0 else logits / temperature


def sampled_logprobs(logits_tv: Tensor, ids_t: Tensor, temperature: float) -> Tensor:
    """Full-softmax log-probability [T] in nats of each token `ids_t` under logits [T, V] / temperature (> 0)."""
    scaled = _scaled(logits_tv, temperature)
    return scaled.gather(-1, ids_t[:, None])[:, 0] - scaled.logsumexp(-1)


def entropy(logits_tv: Tensor, temperature: float) -> Tensor:
    """Entropy [T] in nats of softmax(logits / temperature), from logits [T, V]."""
    scaled = _scaled(logits_tv, temperature)
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


class Head(NamedTuple):
    """What a model makes logits [T, V] with, of its last hidden states [T, H]: weight [V, H], bias [V].

    softcap: logits become softcap · tanh(logits / softcap) (Gemma 2), then they are divided by `divisor` (Granite, Cohere).
    group: of the ranks that have V of the vocabulary's rows each; this one has those from `first` on.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    divisor: float = 1.0
    group: dist.ProcessGroup | None = None
    first: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The output layer of a causal LM, and what its configuration says is done with the logits. No copies."""
        layer, kind, config = model.get_output_embeddings(), model.config.model_type, model.config
        divisor = 1 / getattr(config, _FACTORS[kind]) if kind in _FACTORS else 1.0
        if kind in _DIVIDED:
            divisor = config.logits_scaling
        softcap = config.final_logit_softcapping if kind in _CAPPED else None
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if not isinstance(weight, DTensor):
            return cls(weight, bias, softcap, divisor)
        mesh, local = weight.device_mesh, weight.to_local()
        group, first = (mesh.get_group(), mesh.get_local_rank() * len(local)) if weight.placements[0].is_shard() else (None, 0)
        return cls(local, None if bias is None else bias.to_local(), softcap, divisor, group, first)

    def logits(self, hidden_th: Tensor) -> Tensor:
        """All logits of its rows at once."""
        logits_tv = F.linear(hidden_th, self.weight, self.bias)
        if self.softcap is not None:
            logits_tv = torch.tanh(logits_tv / self.softcap) * self.softcap
        return logits_tv if self.divisor == 1.0 else logits_tv / self.divisor

    def logprobs(self, hidden_th: Tensor, ids_t: Tensor, temperature: float, rows: int | None = None) -> Tensor:
        """As `scores`, without the entropies."""
        logp_t, _ = self._apply(hidden_th, ids_t, temperature, rows, False)
        return logp_t

    def scores(self, hidden_th: Tensor, ids_t: Tensor, temperature: float, rows: int | None = None) -> Scores:
        """What `sampled_logprobs` and `entropy` make of these logits, to the bit, of `rows` rows at a time.

        The backward pass makes the logits again, chunk by chunk, and sums the chunks' gradients of the weights in float32:
        equal but for rounding. rows: by default as many as have CHUNK_LOGITS logits, at least FEWEST_ROWS. Of several ranks
        each makes the logits of its part of the vocabulary; all wait for each other, once in each pass.
        """
        return self._apply(hidden_th, ids_t, temperature, rows, True)

    def _apply(self, hidden_th: Tensor, ids_t: Tensor, temperature: float, rows: int | None, entropies: bool) -> Scores:
        how = _How(self, temperature, rows or max(FEWEST_ROWS, CHUNK_LOGITS // len(self.weight)), entropies)
        logp_t, entropy_t = _Scored.apply(hidden_th, self.weight, self.bias, ids_t - self.first, how)
        return logp_t, entropy_t

    def slope(self, logits_tv: Tensor) -> Tensor | float:
        """The derivative of the logits by what the matrix and the bias made."""
        if self.softcap is None:
            return 1 / self.divisor
        return (1 - (logits_tv * self.divisor / self.softcap) ** 2) / self.divisor


class _How(NamedTuple):
    head: Head
    temperature: float
    rows: int
    entropies: bool  # else none are made


class _Sums(NamedTuple):
    """Of z = logits / temperature over the vocabulary, or over a rank's part of it [T]."""

    chosen_t: Tensor  # z of the token; 0 where it is another rank's
    logsumexp_t: Tensor
    mean_t: Tensor  # Σ softmax(z) · z; empty where no entropies are made

    @classmethod
    def of(cls, logits_tv: Tensor, ids_t: Tensor, how: _How) -> "_Sums":
        scaled = _scaled(logits_tv, how.temperature)
        inside_t, column_t1 = _place(ids_t, scaled)
        mean_t = (scaled.softmax(-1) * scaled).sum(-1) if how.entropies else scaled.new_empty(0)
        return cls(torch.where(inside_t, scaled.gather(-1, column_t1)[:, 0], 0), scaled.logsumexp(-1), mean_t)

    def over(self, group: dist.ProcessGroup) -> "_Sums":
        """Those of the whole vocabulary, from every rank's part."""
        own = torch.cat(self)
        parts = own.new_empty(group.size() * len(own))
        dist.all_gather_into_tensor(parts, own, group=group)
        chosen_rt, logsumexp_rt, mean_rt = parts.view(group.size(), -1).split([len(part) for part in self], dim=1)
        whole_t = logsumexp_rt.logsumexp(0)
        mean_t = ((logsumexp_rt - whole_t).exp() * mean_rt).sum(0) if len(self.mean_t) else self.mean_t
        return _Sums(chosen_rt.sum(0), whole_t, mean_t)


class _Scored(torch.autograd.Function):
    """Head.scores. In place of logits [T, V] it keeps the hidden states [T, H]."""

    @staticmethod
    def forward(ctx: Any, hidden_th: Tensor, weight_vh: Tensor, bias_v: Tensor | None, ids_t: Tensor, how: _How) -> Scores:
        chunks = zip(hidden_th.split(how.rows), ids_t.split(how.rows), strict=True)
        sums = [_Sums.of(how.head.logits(hidden_ch), ids_c, how) for hidden_ch, ids_c in chunks]
        own = whole = _Sums(*map(torch.cat, zip(*sums, strict=True)))
        share_t = None
        if how.head.group is not None:
            whole = own.over(how.head.group)
            share_t = (own.logsumexp_t - whole.logsumexp_t).exp()  # of the probability, that is in this rank's part
        ctx.save_for_backward(hidden_th, ids_t, whole.mean_t, share_t)
        ctx.how = how
        ctx.set_materialize_grads(False)
        entropy_t = whole.logsumexp_t - whole.mean_t if how.entropies else whole.mean_t
        return whole.chosen_t - whole.logsumexp_t, entropy_t

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_th, *columns = ctx.saved_tensors
        head, temperature, rows, _ = ctx.how
        dtype, wide = head.weight.dtype, torch.promote_types(head.weight.dtype, torch.float32)
        hidden_grad_th = torch.empty_like(hidden_th)
        weight_grad_vh, bias_grad_v = (
            torch.zeros_like(part, dtype=wide) if part is not None and needed else None
            for part, needed in zip((head.weight, head.bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for start in range(0, len(hidden_th), rows):
            part = slice(start, start + rows)
            logits_cv = head.logits(hidden_th[part])
            of_part: list[Any] = [column if column is None else column[part] for column in (*columns, *grads)]
            grad_cv = _logits_grad(logits_cv, temperature, *of_part)
            grad_cv = (grad_cv * head.slope(logits_cv)).to(dtype)
            hidden_grad_th[part] = grad_cv @ head.weight
            if weight_grad_vh is not None and dtype == wide:
                weight_grad_vh.addmm_(grad_cv.T, hidden_th[part])  # without a second tensor of that size
            elif weight_grad_vh is not None:
                weight_grad_vh += grad_cv.T @ hidden_th[part]
            if bias_grad_v is not None:
                bias_grad_v += grad_cv.sum(0)
        if head.group is not None:
            dist.all_reduce(hidden_grad_th, group=head.group)
        of_head = (None if grad is None else grad.to(dtype) for grad in (weight_grad_vh, bias_grad_v))
        return hidden_grad_th, *of_head, None, None


def _place(ids_t: Tensor, logits_tv: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are among those of the logits [T] bool, and their columns there [T, 1]."""
    last = logits_tv.shape[1] - 1
    return (ids_t >= 0) & (ids_t <= last), ids_t.clamp(0, last)[:, None]


def _logits_grad(
    logits_tv: Tensor,
    temperature: float,
    ids_t: Tensor,
    mean_t: Tensor,
    share_t: Tensor | None,
    logp_t: Tensor | None,
    entropy_t: Tensor | None,
) -> Tensor:
    """The gradient by the logits [T, V] of what has these gradients by log-probabilities and entropies [T]; None is zero.

    With z = logits / temperature and p = softmax(z): ∂logp(i)/∂z = δ(i) − p, ∂H/∂z = p · (Σ p·z − z). mean_t: Σ p·z.
    """
    scaled = _scaled(logits_tv, temperature)
    p_tv = scaled.softmax(-1)
    if share_t is not None:
        p_tv *= share_t[:, None]
    grad_tv = torch.zeros_like(p_tv)
    if entropy_t is not None:
        grad_tv = p_tv * (mean_t[:, None] - scaled) * entropy_t[:, None]
    if logp_t is not None:
        grad_tv -= p_tv * logp_t[:, None]
        inside_t, column_t1 = _place(ids_t, scaled)
        grad_tv.scatter_add_(1, column_t1, torch.where(inside_t, logp_t, 0)[:, None])
    return grad_tv / temperature
