"""What an optimizer step takes, for reinforcement learning and for supervised warm starts alike: AdamW, packs, the guard."""

import logging
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from asyncrl.config import LearnerSpec
from asyncrl.learn.packing import split_into_packs
from asyncrl.models.packed import Pack, TokenSequence, make_pack

log = logging.getLogger(__name__)
CPU_PACK_TOKENS = 2048  # beyond it a CPU only loses its caches (measured: 16,384 is a third slower)


def make_optimizer(model: PreTrainedModel, spec: LearnerSpec) -> torch.optim.Optimizer:
    """AdamW over all of the model's parameters."""
    if model.dtype != torch.float32:
        log.warning(
            "model.dtype=%s rounds away every optimizer step below 1/512 of a weight: lr=%g may train nothing; "
            "use model.dtype=float32",
            str(model.dtype).removeprefix("torch."),
            spec.lr,
        )
    return torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate


def make_packs(sequences: Sequence[TokenSequence], members: Sequence[int], max_tokens: int, device: torch.device) -> list[Pack]:
    """The sequences with the given indices in packs of at most max_tokens, or what a CPU's caches like, on the device."""
    bound = min(max_tokens, CPU_PACK_TOKENS) if device.type == "cpu" else max_tokens
    return [make_pack(sequences, pack, device) for pack in split_into_packs(sequences, members, bound)]


def guarded_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: float
) -> tuple[float, str]:
    """Clips the gradient (max_grad_norm 0: not) and steps, unless loss or gradient is not finite: weights then stay.

    Returns the gradient's norm before clipping, and why there was no step; empty if there was one.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item()
    if not math.isfinite(loss):
        return norm, f"the loss is {loss}"
    if not math.isfinite(norm):
        return norm, f"the gradient norm is {norm}"
    optimizer.step()
    return norm, ""
