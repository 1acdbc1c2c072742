"""Log-probabilities of sampled tokens, in float32 whatever the model's dtype, at the sampling temperature."""

import torch


def _scaled(logits_tv: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits_tv.float() if logits_tv.dtype in (torch.bfloat16, torch.float16) else logits_tv
    return logits if temperature == 1.0 else logits / temperature


def sampled_logprobs(logits_tv: torch.Tensor, ids_t: torch.Tensor, temperature: float) -> torch.Tensor:
    """Full-softmax log-probability [T] in nats of each token `ids_t` under logits [T, V] / temperature (> 0)."""
    scaled = _scaled(logits_tv, temperature)
    return scaled.gather(-1, ids_t[:, None])[:, 0] - scaled.logsumexp(-1)


def entropy(logits_tv: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy [T] in nats of softmax(logits / temperature), from logits [T, V]."""
    scaled = _scaled(logits_tv, temperature)
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)
