"""The loss of one pack: policy loss × correction × masks + KL + entropy bonus, put together by name. Pure."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import CORRECTIONS, Columns, interpolated_proximal, rejection_mask
from asyncrl.algorithms.kl import k3, token_kl
from asyncrl.algorithms.losses import log_ratio, policy_loss
from asyncrl.config import AlgorithmSpec


class TokenWeights(NamedTuple):
    """How a token counts in the policy loss, [T] each."""

    weights_t: Tensor  # 0 where it is masked
    capped_t: Tensor  # bool: the correction's weight was truncated
    masked_t: Tensor  # bool
    ratio_t: Tensor  # to the policy that the loss compares with


def needs_proximal(spec: AlgorithmSpec) -> bool:
    """Whether anything compares with the policy at the start of the update."""
    return bool(set(spec.masks) - {"off_policy_sequence"}) or (
        spec.ratio_to == "proximal" and spec.correction != "decoupled_loglinear"
    )


def objective(
    spec: AlgorithmSpec,
    columns: Columns,
    logp_t: Tensor,
    entropy_t: Tensor,
    kl_coef: float | None = None,
    weight_mean: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor], TokenWeights]:
    """This pack's share of the minibatch's loss (a scalar to sum over packs), sums for `loss_metrics`, and how tokens counted.

    logp_t, entropy_t [T] from the current policy, with gradient. kl_coef: where it adapts; None: the recipe's. weight_mean: by
    which the correction's weights are divided, see `mean_weight`.
    """
    old_t = _old(spec, columns, logp_t)
    loss_t, figures = policy_loss(spec)(logp_t, old_t, columns.advantages_t, columns.sequence_t)
    counted = _token_weights(spec, columns, old_t, logp_t.detach(), weight_mean)
    pg_loss = (columns.coefficients_t * counted.weights_t * loss_t).sum()
    loss = pg_loss
    sums = {
        "pg_loss": pg_loss.detach(),
        "tokens": logp_t.new_tensor(len(logp_t)),
        "entropy": entropy_t.detach().sum(),
        "ppo_kl": (old_t - logp_t.detach()).sum(),
        "ppo_kl_k3": k3(old_t, logp_t.detach()).sum(),
        **{f"figure/{name}": values_t.detach().sum() for name, values_t in figures.items()},
    }
    if "pg_clipfrac" in figures:
        sums |= _clip_sides(spec, figures["pg_clipfrac"].detach(), columns.advantages_t)
    if columns.reference_t is not None:
        kl_t = token_kl(spec.setting("kl_estimator"), logp_t, columns.reference_t, columns.behaviour_t)
        loss = loss + (spec.kl_coef if kl_coef is None else kl_coef) * (columns.coefficients_t * kl_t).sum()
        sums["kl"] = kl_t.detach().sum()
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * (columns.coefficients_t * entropy_t).sum()
    return loss, sums, counted


def _old(spec: AlgorithmSpec, columns: Columns, logp_t: Tensor) -> Tensor:
    """Logprobs [T] of the policy that the ratio is taken to, without gradient."""
    if spec.ratio_to == "behaviour":
        return columns.behaviour_t
    if spec.correction == "decoupled_loglinear":
        return interpolated_proximal(logp_t, columns.behaviour_t, columns.lag_t)
    return columns.proximal_t


def _token_weights(spec: AlgorithmSpec, columns: Columns, old_t: Tensor, present_t: Tensor, weight_mean: float) -> TokenWeights:
    correction = "none" if spec.learns_preferences else spec.correction
    weights_t, capped_t = CORRECTIONS[correction](spec, old_t, columns.behaviour_t, columns.sequence_t)
    kept_t = rejection_mask(spec, columns, present_t)
    return TokenWeights(weights_t * kept_t / weight_mean, capped_t, ~kept_t, log_ratio(present_t, old_t).exp())


def _clip_sides(spec: AlgorithmSpec, clipped_t: Tensor, advantages_t: Tensor) -> dict[str, Tensor]:
    """Clipped tokens by bound, as TRL counts them: good ones at the upper, bad ones at the lower. CISPO has no lower bound."""
    low_t = clipped_t * (advantages_t < 0) * (spec.policy_loss != "cispo")
    return {"clip/low_mean": low_t.sum(), "clip/high_mean": (clipped_t * ~low_t.bool()).sum()}


def mean_weight(spec: AlgorithmSpec, proximal_n: Tensor, behaviour_n: Tensor, sequence_n: Tensor, counts_s: Tensor) -> float:
    """The mean of a batch's truncated weights, masked or not: over its tokens, or its sequences where these share one.

    Divided by it, weights are 1 on average, and a batch's step is as long as if nothing were stale (self-normalized importance
    sampling; verl's rollout_is_batch_normalize). Columns [N] and counts_s [S] are of a whole batch. A weight that is not a
    number adds nothing: its own minibatch is refused, not all of them.
    """
    share_s = AGGREGATIONS["seq-mean-token-mean" if spec.correction == "tis_sequence" else "token-mean"](spec, counts_s)
    weights_n = CORRECTIONS[spec.correction](spec, proximal_n, behaviour_n, sequence_n).weights_t
    return float((share_s[sequence_n] * weights_n).double().nansum())


def loss_metrics(sums: Mapping[str, float], steps: int) -> dict[str, float]:
    """User-facing figures from sums over the packs of `steps` optimizer steps. No step: no figures."""
    tokens = sums.get("tokens", 0.0)
    if not tokens:
        return {}
    named = {
        "actor/pg_loss": sums["pg_loss"] / steps,
        "actor/entropy": sums["entropy"] / tokens,
        "actor/ppo_kl": sums["ppo_kl"] / tokens,
        "actor/ppo_kl_k3": sums["ppo_kl_k3"] / tokens,
        "actor/grad_norm": sums["grad_norm"] / steps,
    }
    if "kl" in sums:
        named["actor/kl_loss"] = sums["kl"] / tokens
    for prefix, place in (("figure/", "actor/"), ("clip/", "clip_ratio/")):
        named |= {place + name.removeprefix(prefix): sums[name] / tokens for name in sums if name.startswith(prefix)}
    return named


# ---------------------------------------------------------------------------------------- aggregation
# From one loss per token to one number: a fixed coefficient per sequence, so that loss = Σ_t coefficient[seq(t)] · loss_t.
# The coefficients come from the whole minibatch. A sum over any division into packs is then the same number: how tokens are
# packed can't change a step. To add one: here, and its name in config/algorithm.py.


def _sum_norm(spec: AlgorithmSpec, counts_s: Tensor) -> Tensor:
    assert spec.loss_scale_factor is not None, "refused when the recipe was made"
    return torch.full_like(counts_s, 1.0 / len(counts_s)) / spec.loss_scale_factor


# (recipe, trained tokens of each sequence of the minibatch [S], all >= 1) -> coefficient of each of its tokens [S]
AGGREGATIONS: dict[str, Callable[[AlgorithmSpec, Tensor], Tensor]] = {
    # Every token weighs the same (DAPO): 1 / Σ counts.
    "token-mean": lambda spec, counts_s: torch.full_like(counts_s, 1.0 / counts_s.sum().item()),
    # Every token weighs the same, and a longer batch makes a longer step: 1. verl's.
    "token-sum": lambda spec, counts_s: torch.ones_like(counts_s),
    # Sum over a sequence's tokens, mean over sequences: 1 / S.
    "seq-mean-token-sum": lambda spec, counts_s: torch.full_like(counts_s, 1.0 / len(counts_s)),
    # Mean over a sequence's tokens, mean over sequences (GRPO): 1 / (S · count).
    "seq-mean-token-mean": lambda spec, counts_s: 1.0 / (counts_s * len(counts_s)),
    # Sum over a sequence's tokens over a constant, mean over sequences: 1 / (S · scale). Dr. GRPO (Liu et al. 2025). The scale
    # is the same in every step, or steps would weigh differently.
    "seq-mean-token-sum-norm": _sum_norm,
}
