"""Group-relative advantages: one number per rollout, from the rewards of its group's `ok` rollouts.

rewards_s [S] and groups_s [S] (any integer ids, in any order) are parallel; so is the result. Pure; keeps the dtype. A
group is what is there: evicted or failed members are not waited for, and a group of one gets 0, having nothing to compare
with. Equal rewards give 0 to all.
"""

from collections.abc import Callable

import torch

STD_EPS = 1e-6  # as in verl; keeps a group of all but equal rewards from exploding

GroupEstimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _centered(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards minus their group's mean [S], each rollout's group index [S], rollouts per group [G]."""
    _, index_s, count_g = torch.unique(groups_s, return_inverse=True, return_counts=True)
    sum_g = rewards_s.new_zeros(len(count_g)).index_add(0, index_s, rewards_s)
    return rewards_s - (sum_g / count_g)[index_s], index_s, count_g


def grpo_no_std(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> torch.Tensor:
    """r − mean(group). Dr. GRPO (Liu et al. 2025): dividing by the spread favours questions that are too easy or too hard.

    Dr. GRPO as a whole also sums over tokens and divides by a constant: loss_agg="seq-mean-token-sum-norm".
    """
    return _centered(rewards_s, groups_s)[0]


def grpo(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> torch.Tensor:
    """(r − mean(group)) / (std(group) + 1e-6), std unbiased. GRPO (DeepSeekMath, Shao et al. 2024). A group of one gets 0."""
    centered_s, index_s, count_g = _centered(rewards_s, groups_s)
    squares_g = rewards_s.new_zeros(len(count_g)).index_add(0, index_s, centered_s.square())
    std_g = (squares_g / (count_g - 1).clamp(min=1)).sqrt()
    return centered_s / (std_g[index_s] + STD_EPS)


def rloo(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> torch.Tensor:
    """r − mean of the others in the group, which is n/(n − 1)·(r − mean). RLOO (Ahmadian et al. 2024): an unbiased baseline."""
    centered_s, index_s, count_g = _centered(rewards_s, groups_s)
    factor_g = count_g.to(rewards_s.dtype) / (count_g - 1).clamp(min=1)
    return centered_s * factor_g[index_s]


def opo(rewards_s: torch.Tensor, groups_s: torch.Tensor, lengths_s: torch.Tensor) -> torch.Tensor:
    """r − Σ length·r / Σ length over the group. OPO (Hao et al. 2025): the baseline of least variance, gradients being as long
    as their answers.

    lengths_s [S]: tokens that the policy chose, trained or not. In a group without any, every rollout weighs the same.
    """
    _, index_s, count_g = torch.unique(groups_s, return_inverse=True, return_counts=True)
    zeros_g = rewards_s.new_zeros(len(count_g))
    lengths_s = lengths_s.to(rewards_s.dtype)
    empty_g = zeros_g.index_add(0, index_s, lengths_s) == 0
    weights_s = torch.where(empty_g[index_s], 1.0, lengths_s)
    baseline_g = zeros_g.index_add(0, index_s, weights_s * rewards_s) / zeros_g.index_add(0, index_s, weights_s)
    return rewards_s - baseline_g[index_s]
