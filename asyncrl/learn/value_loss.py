"""What a critic minimizes, and how well its values explain returns. Flat layout [T]; pure."""

import torch


def clipped_value_loss(
    values_t: torch.Tensor, old_t: torch.Tensor, returns_t: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """½·max((V − R)², (V_clip − R)²), V_clip = old + clamp(V − old, ±clip); and where the clipped one is larger, bool.

    PPO's reference implementation (OpenAI baselines, ppo2) and verl. values_t: with gradient. old_t: values at the start of
    the update. returns_t: what they should be. A value that has moved towards its return by more than `clip` has no gradient.
    clip None: ½(V − R)².
    """
    free_t = (values_t - returns_t).square()
    if clip is None:
        return 0.5 * free_t, torch.zeros_like(free_t, dtype=torch.bool)
    held_t = (old_t + (values_t - old_t).clamp(-clip, clip) - returns_t).square()
    return 0.5 * torch.maximum(free_t, held_t), held_t > free_t


def explained_variance(values_n: torch.Tensor, returns_n: torch.Tensor) -> float | None:
    """1 − Var(R − V) / Var(R): 1 is perfect, 0 what a constant does, below 0 is worse. None where returns don't vary."""
    if len(returns_n) < 2:
        return None
    variance = float(returns_n.double().var())
    return 1.0 - float((returns_n - values_n).double().var()) / variance if variance > 0 else None
