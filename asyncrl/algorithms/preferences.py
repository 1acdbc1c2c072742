"""Online DPO and KTO, by the names that a recipe knows them by: the rollouts of a group, ranked by their rewards. Pure.

h_s [S] = β·Σ_t (log π − log π_ref) over a sequence's trained tokens, with gradient: the reward that a policy implies
(Rafailov et al. 2023). What is not trained, tokens of tools or beyond the staleness bound, is in neither logprob.
rewards_s, groups_s [S], parallel to it: who is ranked with whom. Equal rewards are never ranked.

A loss couples sequences, over a whole minibatch. It is one number, and its gradient in h_s all that packs need to know.
"""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from asyncrl.algorithms.rewards import TIE, Outcomes, centered_in_groups
from asyncrl.config import AlgorithmSpec

Figures = dict[str, Tensor]


class Pairs(NamedTuple):
    """Pairs of sequences, [P] each."""

    chosen_p: Tensor  # int64, indices
    rejected_p: Tensor  # likewise
    weights_p: Tensor  # in the rewards' dtype; their sum is 1


def rank_pairs(rewards_s: Tensor, groups_s: Tensor, kind: Literal["best_worst", "all"]) -> Pairs:
    """Pairs within each group, the higher reward chosen. Online DPO (Guo et al. 2024), for groups of any size.

    best_worst: a group's best against its worst; each group that has a pair weighs the same. Several best or worst ones
    share its weight, which is what drawing among them gives on average. all: every two different rewards; each pair weighs
    the same. A group of equal rewards has no pair. Compares all with all: S² booleans.
    """
    better_ss = (groups_s[:, None] == groups_s) & (rewards_s[:, None] > rewards_s)
    if kind == "best_worst":
        best_s, worst_s = ~better_ss.any(0), ~better_ss.any(1)
        better_ss &= best_s[:, None] & worst_s
    chosen_p, rejected_p = better_ss.nonzero(as_tuple=True)
    weights_p = rewards_s.new_ones(len(chosen_p))
    if kind == "best_worst":
        _, index_p, count_g = groups_s[chosen_p].unique(return_inverse=True, return_counts=True)
        weights_p = weights_p / count_g[index_p]
    return Pairs(chosen_p, rejected_p, weights_p / weights_p.sum())


def dpo(h_s: Tensor, pairs: Pairs) -> tuple[Tensor, Figures]:
    """−log σ(h_chosen − h_rejected), the pairs' weighted mean. DPO (Rafailov et al. 2023). No pairs: 0, without figures.

    Figures are such means too, under TRL's names: h of either side, their difference, and how often it is > 0.
    """
    chosen_p, rejected_p, weights_p = h_s[pairs.chosen_p], h_s[pairs.rejected_p], pairs.weights_p.to(h_s.dtype)
    margins_p = chosen_p - rejected_p
    loss = -(weights_p * F.logsigmoid(margins_p)).sum()
    if not len(weights_p):
        return loss, {}
    columns = {"chosen": chosen_p, "rejected": rejected_p, "margins": margins_p, "accuracies": margins_p > 0}
    return loss, {f"rewards/{name}": (weights_p * values_p).sum().detach() for name, values_p in columns.items()}


def desirability(rewards_s: Tensor, groups_s: Tensor) -> Tensor:
    """KTO's labels [S] int64: 1 (desirable) above the mean reward of the group, −1 (undesirable) below, 0 (left out) at it.

    TRL's KTO is told by the data set; a reward has no natural zero, so the other rollouts of the same prompt are the measure.
    Groups of equal rewards are left out, however good, and so are groups of one.
    """
    above_s, index_s, count_g = centered_in_groups(rewards_s, groups_s)
    size_g = rewards_s.new_zeros(len(count_g)).index_add(0, index_s, rewards_s.abs())
    return above_s.sign().long() * (above_s.abs() > TIE * size_g[index_s])


def kto(h_s: Tensor, labels_s: Tensor, *, desirable_weight: float, undesirable_weight: float) -> tuple[Tensor, Figures]:
    """λ_D·(1 − σ(h − z)) of the desirable, λ_U·(1 − σ(z − h)) of the undesirable, mean over both. KTO (Ethayarajh et al. 2024).

    labels_s [S]: see `desirability`. z = max(0, mean h), without gradient: β times the KL to the reference, from all S. The
    paper must take it from mismatched prompts and responses, these being a data set's; here the policy sampled them
    itself, at most max_lag versions ago, and the mean of log π − log π_ref is the estimate as it stands.
    Figures: as in `dpo`, but no accuracies, there being no pairs. Nothing of one kind: none.
    """
    z = h_s.detach().mean().clamp(min=0)
    good_s, bad_s = labels_s > 0, labels_s < 0
    weights_s = desirable_weight * good_s.to(h_s.dtype) + undesirable_weight * bad_s.to(h_s.dtype)
    loss = (weights_s * (labels_s * (z - h_s)).sigmoid()).sum() / (labels_s != 0).sum().clamp(min=1)
    if not (good_s.any() and bad_s.any()):
        return loss, {}
    chosen, rejected = h_s[good_s].mean().detach(), h_s[bad_s].mean().detach()
    return loss, {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}


def preference_loss(spec: AlgorithmSpec, outcomes: Outcomes, members_m: Tensor, h_m: Tensor) -> tuple[Tensor, Figures, int]:
    """The recipe's loss of a minibatch, figures, and how many pairs (dpo) or labelled rollouts (kto) it is the mean of.

    members_m [M]: the minibatch's sequences among the rollouts of `outcomes`. h_m [M]: theirs, with gradient, on any device.
    """
    if spec.policy_loss == "dpo":
        pairs = rank_pairs(outcomes.ranked_s[members_m], outcomes.groups_s[members_m], spec.dpo_pairs)
        return *dpo(h_m, Pairs(*(column_p.to(h_m.device) for column_p in pairs))), len(pairs.weights_p)
    labels_m = desirability(outcomes.ranked_s, outcomes.groups_s)[members_m].to(h_m.device)
    loss, figures = kto(
        h_m, labels_m, desirable_weight=spec.kto_desirable_weight, undesirable_weight=spec.kto_undesirable_weight
    )
    return loss, figures, int(labels_m.count_nonzero())
