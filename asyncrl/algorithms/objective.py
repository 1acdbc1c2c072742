"""The loss of one pack: policy loss × correction × masks + KL + entropy bonus, put together by name. Pure."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch

from asyncrl.algorithms.corrections import CORRECTIONS, interpolated_proximal, pack_mask
from asyncrl.algorithms.kl import KL_ESTIMATORS
from asyncrl.algorithms.losses import Loss, cispo, clipped_ppo, dppo_kl, dppo_tv, gmpo, gspo, policy_gradient, sapo
from asyncrl.config import PREFERENCE_LOSSES, AlgorithmSpec
from asyncrl.config.callables import load_callable
from asyncrl.errors import ConfigError

# --------------------------------------------------------------------------------------- policy loss
# Policy losses by name, with the recipe's bounds filled in.
# The user's own is named in the recipe as `file.py:name`: `f(logp_t, old_t, advantages_t, sequence_t) -> (loss_t, figures)`,
# as described in `losses`; figures may be {}. Weights, masks, KL, entropy and aggregation are added around it.

PolicyLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Loss]

POLICY_LOSSES: dict[str, Callable[[AlgorithmSpec], PolicyLoss]] = {
    "ppo": lambda spec: (
        lambda logp_t, old_t, advantages_t, _: clipped_ppo(
            logp_t, old_t, advantages_t, clip_low=spec.clip_ratio, clip_high=spec.clip_high, dual=spec.clip_ratio_c
        )
    ),
    "gspo": lambda spec: lambda *columns: gspo(*columns, clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "gmpo": lambda spec: lambda *columns: gmpo(*columns, clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "cispo": lambda spec: lambda *columns: cispo(*columns[:3], clip_high=spec.clip_high),
    "dppo_tv": lambda spec: lambda *columns: dppo_tv(*columns[:3], clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "dppo_kl": lambda spec: lambda *columns: dppo_kl(*columns[:3], clip_low=spec.clip_ratio, clip_high=spec.clip_high),
    "sapo": lambda spec: (
        lambda *columns: sapo(*columns[:3], tau_positive=spec.sapo_tau_positive, tau_negative=spec.sapo_tau_negative)
    ),
    "pg": lambda spec: lambda logp_t, _, advantages_t, __: policy_gradient(logp_t, advantages_t),
}
POLICY_LOSSES |= dict.fromkeys(PREFERENCE_LOSSES, POLICY_LOSSES["pg"])  # with the advantages of preference_step


@cache
def policy_loss(spec: AlgorithmSpec) -> PolicyLoss:
    """The recipe's loss. Raises ConfigError where a user's can't be loaded, or (when called) gives no loss per token."""
    if spec.policy_loss in POLICY_LOSSES:
        return POLICY_LOSSES[spec.policy_loss](spec)
    function = load_callable(spec.policy_loss, "algorithm.policy_loss")

    def checked(logp_t: torch.Tensor, old_t: torch.Tensor, advantages_t: torch.Tensor, sequence_t: torch.Tensor) -> Loss:
        found = function(logp_t, old_t, advantages_t, sequence_t)
        if not (isinstance(found, tuple) and len(found) == 2 and getattr(found[0], "shape", None) == logp_t.shape):
            raise ConfigError(
                f"algorithm.policy_loss={spec.policy_loss!r} did not return (loss_t, figures) with one loss for each of "
                f"{len(logp_t)} tokens: it could not be weighed or aggregated; return a tensor of shape "
                f"{tuple(logp_t.shape)} and a dict, which may be empty"
            )
        return found

    return checked


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
    """This pack's share of the minibatch's loss (a scalar to sum over packs), sums for `loss_metrics`, and how tokens counted.

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


def loss_metrics(sums: Mapping[str, float], steps: int) -> dict[str, float]:
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


# ----------------------------------------------------------------------------------------- aggregate
# From one loss per token to one number: a fixed coefficient per sequence, so that loss = Σ_t coefficient[seq(t)] · loss_t.
# The coefficients come from the whole minibatch. A sum over any division into packs is then the same number: how tokens are
# packed can't change a step. counts_s [S]: trained tokens of each sequence of the minibatch, all >= 1. Pure.

Aggregation = Callable[[torch.Tensor], torch.Tensor]


def token_mean(counts_s: torch.Tensor) -> torch.Tensor:
    """Every token weighs the same (DAPO): 1 / Σ counts."""
    return torch.full_like(counts_s, 1.0 / counts_s.sum().item())


def seq_mean_token_sum(counts_s: torch.Tensor) -> torch.Tensor:
    """Sum over a sequence's tokens, mean over sequences: 1 / S."""
    return torch.full_like(counts_s, 1.0 / len(counts_s))


def seq_mean_token_mean(counts_s: torch.Tensor) -> torch.Tensor:
    """Mean over a sequence's tokens, mean over sequences (GRPO): 1 / (S · count)."""
    return 1.0 / (counts_s * len(counts_s))


def seq_mean_token_sum_norm(counts_s: torch.Tensor, scale: int) -> torch.Tensor:
    """Sum over a sequence's tokens over a constant, mean over sequences: 1 / (S · scale). Dr. GRPO (Liu et al. 2025).

    scale: tokens, usually the longest response; the same in every step, or steps would weigh differently.
    """
    return seq_mean_token_sum(counts_s) / scale


AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-mean": seq_mean_token_mean,
}


def aggregation(spec: AlgorithmSpec) -> Aggregation:
    """The recipe's aggregation."""
    if spec.loss_agg == "seq-mean-token-sum-norm":
        assert spec.loss_scale_factor is not None, "refused when the recipe was made"
        return partial(seq_mean_token_sum_norm, scale=spec.loss_scale_factor)
    return AGGREGATIONS[spec.loss_agg]
