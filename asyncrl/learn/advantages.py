"""Group-relative advantages: one number per rollout, from the rewards of its group's `ok` rollouts.

rewards_s [S] and groups_s [S] (any integer ids, in any order) are parallel; so is the result. Pure; keeps the dtype.
"""

from collections.abc import Callable

import torch

STD_EPS = 1e-6  # as in verl; keeps a group of all but equal rewards from exploding

Estimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _centered(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards minus their group's mean [S], each rollout's group index [S], rollouts per group [G]."""
    _, index_s, count_g = torch.unique(groups_s, return_inverse=True, return_counts=True)
    sum_g = rewards_s.new_zeros(len(count_g)).index_add(0, index_s, rewards_s)
    return rewards_s - (sum_g / count_g)[index_s], index_s, count_g


def grpo_no_std(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> torch.Tensor:
    """r − mean(group). Dr. GRPO (Liu et al. 2025): dividing by the spread favours questions that are too easy or too hard.

    A group of one gets 0: there is nothing to compare with.
    """
    return _centered(rewards_s, groups_s)[0]


def grpo(rewards_s: torch.Tensor, groups_s: torch.Tensor) -> torch.Tensor:
    """(r − mean(group)) / (std(group) + 1e-6), std unbiased. GRPO (DeepSeekMath, Shao et al. 2024). A group of one gets 0."""
    centered_s, index_s, count_g = _centered(rewards_s, groups_s)
    squares_g = rewards_s.new_zeros(len(count_g)).index_add(0, index_s, centered_s.square())
    std_g = (squares_g / (count_g - 1).clamp(min=1)).sqrt()
    return centered_s / (std_g[index_s] + STD_EPS)


ESTIMATORS: dict[str, Estimator] = {"grpo": grpo, "grpo_no_std": grpo_no_std}
