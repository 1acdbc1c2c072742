"""An optimizer step of DPO or KTO, whose loss couples sequences of different packs, as one that packs can make on their own.

The loss L is a function of h_s alone, and h_s = β·Σ_t (logp − reference): so dL/dlogp_t = β·dL/dh of the token's sequence.
That is a policy gradient with advantages −β·dL/dh, summed over tokens. L and dL/dh come from logprobs of the whole
minibatch, made without gradient before its packs; the packs' gradients then add up to that of L, however it is divided.
"""

from collections.abc import Mapping

import torch

from asyncrl.algorithms.preferences import preference_loss
from asyncrl.config import AlgorithmSpec
from asyncrl.learn.update import Minibatch, Update
from asyncrl.models.packed import PackedModel


def prefer(
    spec: AlgorithmSpec, policy: PackedModel, update: Update, minibatch: Minibatch, coefficient_s: torch.Tensor
) -> dict[str, float]:
    """Makes the advantages of a minibatch's tokens (0 elsewhere); returns its loss and sums for `preference_metrics`.

    coefficient_s [S]: what a token will weigh in the policy loss (AGGREGATIONS), so that it can be divided out.
    """
    assert update.reference_n is not None, "preferences without a reference"
    members, packs = minibatch
    batch = update.batch
    logp_n = update.proximal_n  # which are those before the first step
    if update.actor.tried:
        logp_n = policy.score(packs, torch.full_like(logp_n, torch.nan))
    rollouts_r, rollout_m = batch.rollouts_s[members].unique_consecutive(return_inverse=True)
    rollout_n = batch.rollouts_s[batch.sequence_n]
    ratios = coefficient_s.new_zeros(len(batch.outcomes.groups_s)).index_add(0, rollout_n, logp_n - update.reference_n)
    ratio_r = ratios[rollouts_r]
    h_r = (spec.preference_beta * ratio_r).requires_grad_()
    loss, figures, told = preference_loss(spec, batch.outcomes, rollouts_r.cpu(), h_r)
    (slope_r,) = torch.autograd.grad(loss, h_r)
    advantage_s = torch.zeros_like(coefficient_s)
    advantage_s[members] = -spec.preference_beta * slope_r[rollout_m] / coefficient_s[members]
    means = {**figures, "objective/kl": ratio_r.mean()}
    update.advantages_n = advantage_s[batch.sequence_n]
    return {
        "pg_loss": loss.item(),
        "preference_steps": float(bool(figures)),
        "preferences": float(told),
        **{f"preference/{name}": value.item() for name, value in means.items() if figures},
    }


def preference_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Figures of an update under TRL's names, from sums over its accepted steps: means over those that had any."""
    steps = sums.get("preference_steps", 0.0)
    if not steps:
        return {}
    named = {name.removeprefix("preference/"): value / steps for name, value in sums.items() if name.startswith("preference/")}
    return {**named, "preferences": sums["preferences"]}
