"""The loss of one pack: policy loss × correction × masks + KL + entropy bonus, put together by name. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from asyncrl.algorithm import AlgorithmSpec
from asyncrl.learn.corrections import CORRECTIONS, interpolated_proximal
from asyncrl.learn.kl import KL_ESTIMATORS
from asyncrl.learn.masks import pack_mask
from asyncrl.learn.policy_loss import policy_loss


class Columns(NamedTuple):
    """What the loss needs of each trained token, [T] each. coefficients_t: see `aggregate`. reference_t: None without KL in
    the loss. kept_t: what a mask over the whole minibatch leaves (m2po), or None. proximal_t: may be NaN where
    `needs_proximal` says that nothing asks for it."""

    coefficients_t: torch.Tensor
    advantages_t: torch.Tensor
    behaviour_t: torch.Tensor
    proximal_t: torch.Tensor
    sequence_t: torch.Tensor
    lag_t: torch.Tensor
    reference_t: torch.Tensor | None = None
    kept_t: torch.Tensor | None = None


class TokenWeights(NamedTuple):
    """How a token counts in the policy loss [T]: weights_t with masked tokens at 0; capped_t, masked_t bool."""

    weights_t: torch.Tensor
    capped_t: torch.Tensor
    masked_t: torch.Tensor


def needs_proximal(spec: AlgorithmSpec) -> bool:
    """Whether anything compares with the policy at the start of the update."""
    return bool(spec.masks) or (spec.ratio_to == "proximal" and spec.correction != "decoupled_loglinear")


def objective(
    spec: AlgorithmSpec, columns: Columns, logp_t: torch.Tensor, entropy_t: torch.Tensor, kl_coef: float | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], TokenWeights]:
    """This pack's share of the minibatch's loss (a scalar to sum over packs), sums for `metrics`, and how tokens counted.

    logp_t, entropy_t [T] from the current policy, with gradient. kl_coef: where it adapts; None: the recipe's.
    """
    old_t = _old(spec, columns, logp_t)
    loss_t, figures = policy_loss(spec)(logp_t, old_t, columns.advantages_t, columns.sequence_t)
    counted = _count(spec, columns, old_t)
    pg_loss = (columns.coefficients_t * counted.weights_t * loss_t).sum()
    loss = pg_loss
    sums = {
        "pg_loss": pg_loss.detach(),
        "tokens": logp_t.new_tensor(len(logp_t)),
        "entropy": entropy_t.detach().sum(),
        "ppo_kl": (old_t - logp_t.detach()).sum(),
        **{f"figure/{name}": values_t.detach().sum() for name, values_t in figures.items()},
    }
    if columns.reference_t is not None:
        kl_t = KL_ESTIMATORS[spec.kl_estimator](logp_t, columns.reference_t)
        loss = loss + (spec.kl_coef if kl_coef is None else kl_coef) * (columns.coefficients_t * kl_t).sum()
        sums["kl"] = kl_t.detach().sum()
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * (columns.coefficients_t * entropy_t).sum()
    return loss, sums, counted


def _old(spec: AlgorithmSpec, columns: Columns, logp_t: torch.Tensor) -> torch.Tensor:
    """Logprobs [T] of the policy that the ratio is taken to, without gradient."""
    if spec.ratio_to == "behaviour":
        return columns.behaviour_t
    if spec.correction == "decoupled_loglinear":
        return interpolated_proximal(logp_t, columns.behaviour_t, columns.lag_t)
    return columns.proximal_t


def _count(spec: AlgorithmSpec, columns: Columns, old_t: torch.Tensor) -> TokenWeights:
    correction = "none" if spec.learns_preferences else spec.correction
    weights_t, capped_t = CORRECTIONS[correction](spec, old_t, columns.behaviour_t, columns.sequence_t)
    within_t = pack_mask(spec, (columns.proximal_t - columns.behaviour_t).detach(), columns.sequence_t)
    kept = [kept_t for kept_t in (within_t, columns.kept_t) if kept_t is not None]
    if not kept:
        return TokenWeights(weights_t, capped_t, torch.zeros_like(capped_t))
    kept_t = torch.stack(kept).all(0)
    return TokenWeights(weights_t * kept_t, capped_t, ~kept_t)


def metrics(sums: Mapping[str, float], steps: int) -> dict[str, float]:
    """User-facing figures from sums over the packs of `steps` optimizer steps. No step: no figures."""
    tokens = sums.get("tokens", 0.0)
    if not tokens:
        return {}
    named = {
        "actor/pg_loss": sums["pg_loss"] / steps,
        "actor/entropy": sums["entropy"] / tokens,
        "actor/ppo_kl": sums["ppo_kl"] / tokens,
        "actor/grad_norm": sums["grad_norm"] / steps,
    }
    if "kl" in sums:
        named["actor/kl_loss"] = sums["kl"] / tokens
    for name, value in sums.items():
        if name.startswith("figure/"):
            named[f"actor/{name.removeprefix('figure/')}"] = value / tokens
    return named
