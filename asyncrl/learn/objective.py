"""The loss of one pack: policy loss × correction + KL + entropy bonus, put together by name. Pure."""

from typing import NamedTuple

import torch

from asyncrl.config import AlgorithmSpec
from asyncrl.learn.corrections import CORRECTIONS
from asyncrl.learn.kl import KL_ESTIMATORS
from asyncrl.learn.losses import POLICY_LOSSES


class Columns(NamedTuple):
    """What the loss needs of each trained token, [T] each. coefficients_t: see `aggregate`. reference_t: None without KL."""

    coefficients_t: torch.Tensor
    advantages_t: torch.Tensor
    behaviour_t: torch.Tensor
    proximal_t: torch.Tensor
    reference_t: torch.Tensor | None


def objective(
    spec: AlgorithmSpec, columns: Columns, logp_t: torch.Tensor, entropy_t: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This pack's share of the minibatch's loss (a scalar to sum over packs), and sums for `metrics`.

    logp_t, entropy_t [T] from the current policy, with gradient.
    """
    proximal_t = columns.proximal_t
    high = spec.clip_ratio if spec.clip_ratio_high is None else spec.clip_ratio_high
    loss_t, clipped_t = POLICY_LOSSES[spec.policy_loss](
        logp_t, proximal_t, columns.advantages_t, clip_low=spec.clip_ratio, clip_high=high
    )
    weights_t, capped_t = CORRECTIONS[spec.correction](proximal_t, columns.behaviour_t, spec.behaviour_cap)
    pg_loss = (columns.coefficients_t * weights_t * loss_t).sum()
    loss = pg_loss
    sums = {
        "pg_loss": pg_loss.detach(),
        "tokens": logp_t.new_tensor(len(logp_t)),
        "entropy": entropy_t.detach().sum(),
        "ppo_kl": (proximal_t - logp_t.detach()).sum(),
        "clipped": clipped_t.sum(),
        "weight": weights_t.sum(),
        "weight_squared": weights_t.square().sum(),
        "capped": capped_t.sum(),
    }
    if columns.reference_t is not None:
        kl_t = KL_ESTIMATORS[spec.kl_estimator](logp_t, columns.reference_t)
        loss = loss + spec.kl_coef * (columns.coefficients_t * kl_t).sum()
        sums["kl"] = kl_t.detach().sum()
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * (columns.coefficients_t * entropy_t).sum()
    return loss, sums


def metrics(sums: dict[str, float], steps: int) -> dict[str, float]:
    """User-facing figures from sums over the packs of `steps` optimizer steps. No step: no figures."""
    tokens = sums.get("tokens", 0.0)
    if not tokens:
        return {}
    named = {
        "actor/pg_loss": sums["pg_loss"] / steps,
        "actor/entropy": sums["entropy"] / tokens,
        "actor/ppo_kl": sums["ppo_kl"] / tokens,
        "actor/pg_clipfrac": sums["clipped"] / tokens,
        "actor/grad_norm": sums["grad_norm"] / steps,
        "correction/cap_share": sums["capped"] / tokens,
        "correction/ess": sums["weight"] ** 2 / (tokens * sums["weight_squared"]),
    }
    if "kl" in sums:
        named["actor/kl_loss"] = sums["kl"] / tokens
    return named
