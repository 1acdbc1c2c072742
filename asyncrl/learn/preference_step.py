"""An optimizer step of DPO or KTO, whose loss couples sequences of different packs, as one that packs can make on their own.

The loss L is a function of h_s alone, and h_s = β·Σ_t (logp − reference): so dL/dlogp_t = β·dL/dh of the token's sequence.
That is a policy gradient with advantages −β·dL/dh, summed over tokens. L and dL/dh come from logprobs of the whole
minibatch, made without gradient before its packs; the packs' gradients then add up to that of L, however it is divided.
"""

from collections.abc import Mapping, Sequence

import torch

from asyncrl.algorithms.preferences import Figures, desirability, dpo, kto, rank_pairs
from asyncrl.config import AlgorithmSpec
from asyncrl.learn.update import Update


def prefer(
    spec: AlgorithmSpec, update: Update, members: Sequence[int], logp_n: torch.Tensor, coefficient_s: torch.Tensor
) -> dict[str, float]:
    """Sets the advantages of a minibatch's tokens; returns its loss and sums for `metrics`.

    members: the minibatch's sequences. logp_n [N]: of the policy before this step; of other tokens than theirs, anything.
    coefficient_s [S]: what a token will weigh in the policy loss (`aggregate`), so that it can be divided out.
    """
    assert update.reference_n is not None, "preferences without a reference"
    sequence_n = update.batch.sequence_n
    ratio_s = torch.zeros_like(coefficient_s).index_add(0, sequence_n, logp_n - update.reference_n)
    h_m = (spec.preference_beta * ratio_s[members]).requires_grad_()
    loss, figures, told = _loss(spec, update, members, h_m)
    (slope_m,) = torch.autograd.grad(loss, h_m)
    advantage_s = torch.zeros_like(coefficient_s)
    advantage_s[members] = -spec.preference_beta * slope_m / coefficient_s[members]
    update.set_advantages(advantage_s[sequence_n])
    means = {**figures, "objective/kl": ratio_s[members].mean()}
    return {
        "pg_loss": loss.item(),
        "preference_steps": float(bool(figures)),
        "preferences": float(told),
        **{f"preference/{name}": value.item() for name, value in means.items() if figures},
    }


def _loss(spec: AlgorithmSpec, update: Update, members: Sequence[int], h_m: torch.Tensor) -> tuple[torch.Tensor, Figures, int]:
    """The loss, figures, and how many pairs (dpo) or labelled rollouts (kto) it is the mean of."""
    outcomes = update.batch.outcomes
    member_of_s = outcomes.sequence_n.unique_consecutive()[list(members)]  # the batch's sequences are rollouts with a token
    if spec.policy_loss == "dpo":
        pairs = rank_pairs(outcomes.ranked_s()[member_of_s], outcomes.groups_s[member_of_s], spec.dpo_pairs).to(h_m.device)
        return *dpo(h_m, pairs), len(pairs.weights_p)
    labels_m = desirability(outcomes.ranked_s(), outcomes.groups_s)[member_of_s].to(h_m.device)
    weights = {"desirable_weight": spec.kto_desirable_weight, "undesirable_weight": spec.kto_undesirable_weight}
    return *kto(h_m, labels_m, **weights), int(labels_m.count_nonzero())


def metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Figures of an update under TRL's names, from sums over its accepted steps: means over those that had any."""
    steps = sums.get("preference_steps", 0.0)
    if not steps:
        return {}
    named = {name.removeprefix("preference/"): value / steps for name, value in sums.items() if name.startswith("preference/")}
    return {**named, "preferences": sums["preferences"]}
