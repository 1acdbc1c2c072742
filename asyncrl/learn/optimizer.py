"""AdamW with a schedule, clipping, and the guard against non-finite steps."""

import logging
import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from asyncrl.config import OptimizerSpec

log = logging.getLogger(__name__)


def learning_rate(spec: OptimizerSpec, committed: int, total_steps: int) -> float:
    """Rate of update `committed + 1`: linear warm-up over warmup_steps, then constant, or a cosine to min_lr_ratio·lr.

    A pure function of the update count, so that a restored run continues it without saved state.
    """
    if committed < spec.warmup_steps:
        return spec.lr * (committed + 1) / spec.warmup_steps
    if spec.lr_schedule == "constant":
        return spec.lr
    progress = min(1.0, (committed - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimization:
    """Trains what is not frozen of `module`, as `spec` says. setting: the name of its lr. adamw: what a checkpoint holds.

    A module that several ranks share must be sharded before: the optimizer holds the parameters that it finds.
    """

    def __init__(self, module: Any, spec: OptimizerSpec, total_steps: int, setting: str) -> None:
        self.module = module
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        dtype = self._parameters[0].dtype
        if dtype != torch.float32:
            log.warning(
                "model.dtype=%s rounds away every optimizer step below 1/512 of a weight: %s=%g may train nothing; "
                "use model.dtype=float32",
                str(dtype).removeprefix("torch."),
                setting,
                spec.lr,
            )
        self.adamw = torch.optim.AdamW(
            self._parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
        )
        self._spec = spec
        self._total_steps = total_steps

    def schedule(self, committed: int) -> float:
        """Sets, and returns, the learning rate of update `committed + 1`."""
        rate = learning_rate(self._spec, committed, self._total_steps)
        for parameters in self.adamw.param_groups:
            parameters["lr"] = rate
        return rate

    def clip(self) -> float:
        """Clips the gradient; returns the norm that it had. Of a sharded module that of all ranks, which all must ask for."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._spec.max_grad_norm or math.inf)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def step(loss: float, *optimizations: Optimization) -> tuple[list[float], str]:
    """One step of all, or of none where the loss or a gradient is not finite. Returns gradient norms, and why not, or ""."""
    norms = [optimization.clip() for optimization in optimizations]
    figures = [("loss", loss), *(("gradient norm", norm) for norm in norms)]
    cause = next((f"the {name} is {value}" for name, value in figures if not math.isfinite(value)), "")
    for optimization in optimizations:
        if not cause:
            optimization.adamw.step()
        optimization.adamw.zero_grad()
    return norms, cause
