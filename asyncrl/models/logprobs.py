"""Log-probabilities of sampled tokens, in float32 whatever the model's dtype, at the sampling temperature."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# What is done with logits, by `model_type`: a configuration may hold such a field though its model reads none.
_DIVIDED = {"granite", "granitemoe", "granitemoeshared"}  # by `logits_scaling`
_FACTORS = {"cohere": "logit_scale", "cohere2": "logit_scale", "cohere2_moe": "logit_scale", "hyperclovax": "logits_scaling"}
_CAPPED = {"gemma3_text", "gemma3n_text", "gemma4_text", "nanochat"}  # at `final_logit_softcapping`

FEWEST_ROWS = 256  # of a chunk: each adds to a gradient as large as the weights
CHUNK_LOGITS = 2**24  # logits that are worked on at a time: 64 MiB in float32, and as much for each step of the work

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
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    divisor: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The output layer of a causal LM, and what its configuration says is done with the logits. No copies."""
        layer, kind, config = model.get_output_embeddings(), model.config.model_type, model.config
        divisor = 1 / getattr(config, _FACTORS[kind]) if kind in _FACTORS else 1.0
        if kind in _DIVIDED:
            divisor = config.logits_scaling
        softcap = config.final_logit_softcapping if kind in _CAPPED else None
        return cls(layer.weight, getattr(layer, "bias", None), softcap, divisor)

    def logits(self, hidden_th: Tensor) -> Tensor:
        """All logits at once."""
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
        equal but for rounding. rows: by default as many as have CHUNK_LOGITS logits, at least FEWEST_ROWS.
        """
        return self._apply(hidden_th, ids_t, temperature, rows, True)

    def _apply(self, hidden_th: Tensor, ids_t: Tensor, temperature: float, rows: int | None, entropies: bool) -> Scores:
        how = _How(self, temperature, rows or max(FEWEST_ROWS, CHUNK_LOGITS // len(self.weight)), entropies)
        logp_t, entropy_t = _Scored.apply(hidden_th, self.weight, self.bias, ids_t, how)
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


class _Scored(torch.autograd.Function):
    """Head.scores. In place of logits [T, V] it keeps the hidden states [T, H]."""

    @staticmethod
    def forward(ctx: Any, hidden_th: Tensor, weight_vh: Tensor, bias_v: Tensor | None, ids_t: Tensor, how: _How) -> Scores:
        logps, entropies = [], [hidden_th.new_empty(0)]
        for hidden_ch, ids_c in zip(hidden_th.split(how.rows), ids_t.split(how.rows), strict=True):
            logits_cv = how.head.logits(hidden_ch)
            logps.append(sampled_logprobs(logits_cv, ids_c, how.temperature))
            if how.entropies:
                entropies.append(entropy(logits_cv, how.temperature))
        ctx.save_for_backward(hidden_th, ids_t)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return torch.cat(logps), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_th, ids_t = ctx.saved_tensors
        head, temperature, rows, _ = ctx.how
        dtype, wide = head.weight.dtype, torch.promote_types(head.weight.dtype, torch.float32)
        hidden_grad_th = torch.empty_like(hidden_th)
        weight_grad_vh, bias_grad_v = (
            torch.zeros_like(part, dtype=wide) if part is not None and needed else None
            for part, needed in zip((head.weight, head.bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for start in range(0, len(ids_t), rows):
            part = slice(start, start + rows)
            logits_cv = head.logits(hidden_th[part])
            grad_cv = _logits_grad(logits_cv, ids_t[part], temperature, *(g if g is None else g[part] for g in grads))
            grad_cv = (grad_cv * head.slope(logits_cv)).to(dtype)
            hidden_grad_th[part] = grad_cv @ head.weight
            if weight_grad_vh is not None and dtype == wide:
                weight_grad_vh.addmm_(grad_cv.T, hidden_th[part])  # without a second tensor of that size
            elif weight_grad_vh is not None:
                weight_grad_vh += grad_cv.T @ hidden_th[part]
            if bias_grad_v is not None:
                bias_grad_v += grad_cv.sum(0)
        of_head = (None if grad is None else grad.to(dtype) for grad in (weight_grad_vh, bias_grad_v))
        return hidden_grad_th, *of_head, None, None


def _logits_grad(
    logits_tv: Tensor, ids_t: Tensor, temperature: float, logp_t: Tensor | None, entropy_t: Tensor | None
) -> Tensor:
    """The gradient by the logits [T, V] of what has these gradients by log-probabilities and entropies [T]; None is zero.

    With z = logits / temperature and p = softmax(z): ∂logp(i)/∂z = δ(i) − p, ∂H/∂z = p · (Σ p·z − z).
    """
    scaled = _scaled(logits_tv, temperature)
    p_tv = scaled.softmax(-1)
    grad_tv = torch.zeros_like(p_tv)
    if entropy_t is not None:
        grad_tv = p_tv * ((p_tv * scaled).sum(-1, keepdim=True) - scaled) * entropy_t[:, None]
    if logp_t is not None:
        grad_tv -= p_tv * logp_t[:, None]
        grad_tv[torch.arange(len(ids_t), device=ids_t.device), ids_t] += logp_t
    return grad_tv / temperature
