"""Learning rate by update. A pure function of the update count, so that a restored run continues it without saved state."""

import math

from asyncrl.learning import OptimizerSpec


def learning_rate(spec: OptimizerSpec, committed: int, total_steps: int) -> float:
    """Rate of update `committed + 1`: linear warm-up over warmup_steps, then constant, or a cosine to min_lr_ratio·lr."""
    if committed < spec.warmup_steps:
        return spec.lr * (committed + 1) / spec.warmup_steps
    if spec.lr_schedule == "constant":
        return spec.lr
    progress = min(1.0, (committed - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
