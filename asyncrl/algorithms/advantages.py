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


# ---------------------------------------------------------------------------------- token advantages
# Advantages per token. Flat layout [N]: the trained tokens of all rollouts, sequence after sequence; pure.
# sequence_n [N], ascending: the rollout of each token. Tokens that are not trained are not there: returns and values go from
# one trained token to the next. A rollout without a trained token has no entry, and none is needed.

WHITEN_EPS = 1e-8


def whitened(values_n: torch.Tensor) -> torch.Tensor:
    """(x − mean) / sqrt(variance + 1e-8) over all tokens, variance unbiased. Equal values, or a single one, give 0."""
    centered_n = values_n - values_n.mean()
    variance = centered_n.square().sum() / max(1, len(values_n) - 1)
    return centered_n * (variance + WHITEN_EPS).rsqrt()


def returns_to_go(rewards_n: torch.Tensor, sequence_n: torch.Tensor) -> torch.Tensor:
    """Sum of a sequence's rewards from each token to its end [N], undiscounted."""
    rest_n = rewards_n.flip(0).cumsum(0).flip(0)  # of this sequence and all later ones
    following_n = torch.searchsorted(sequence_n, sequence_n, right=True)
    return rest_n - torch.cat((rest_n, rest_n.new_zeros(1)))[following_n]


def reinforce_plus_plus(rewards_s: torch.Tensor, shaping_n: torch.Tensor, sequence_n: torch.Tensor) -> torch.Tensor:
    """The return from each token on, whitened over the batch. REINFORCE++ (Hu et al. 2025), γ = 1. Needs no groups.

    rewards_s [S]: due at a rollout's end. shaping_n [N]: what each token earns beside it, such as −β·KL.
    """
    return whitened(rewards_s[sequence_n] + returns_to_go(shaping_n, sequence_n))


def remax(
    rewards_s: torch.Tensor, baselines_s: torch.Tensor, shaping_n: torch.Tensor, sequence_n: torch.Tensor
) -> torch.Tensor:
    """The return from each token on, minus what the greedy rollout of the same prompt earned [N]. ReMax (Li et al. 2023).

    rewards_s, shaping_n: as in reinforce_plus_plus. baselines_s [S]: of each rollout's prompt; it does not depend on what was
    sampled, so the gradient stays unbiased. As in verl it pays no KL. Needs no groups, and nothing is whitened.
    """
    return (rewards_s - baselines_s)[sequence_n] + returns_to_go(shaping_n, sequence_n)


def reinforce_plus_plus_baseline(centered_s: torch.Tensor, sequence_n: torch.Tensor) -> torch.Tensor:
    """r − mean(group), given as centered_s [S], whitened over the batch's tokens. REINFORCE++-baseline (Hu et al. 2025)."""
    return whitened(centered_s[sequence_n])


def gae(
    rewards_n: torch.Tensor, values_n: torch.Tensor, sequence_n: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (what a critic learns) [N] each. GAE (Schulman et al. 2016).

    δ = r + γ·V(next) − V, A = Σ (γλ)^k·δ_k. rewards_n: what each token earned, the rollout's own reward at its last one.
    values_n: the critic's V before each token. After a sequence's last token comes nothing: V = 0.
    """
    _, row_n, count_s = torch.unique_consecutive(sequence_n, return_inverse=True, return_counts=True)
    column_n = torch.arange(len(row_n), device=row_n.device) - (count_s.cumsum(0) - count_s)[row_n]
    shape = (len(count_s), int(count_s.max()) + 1 if len(count_s) else 1)  # the last column: V and A after the end

    def dense(flat_n: torch.Tensor) -> torch.Tensor:
        return flat_n.new_zeros(shape).index_put((row_n, column_n), flat_n)

    rewards_st, values_st = dense(rewards_n), dense(values_n)
    delta_st = rewards_st[:, :-1] + gamma * values_st[:, 1:] - values_st[:, :-1]
    advantage_s = values_n.new_zeros(len(count_s))
    columns = []
    for t in reversed(range(shape[1] - 1)):
        advantage_s = delta_st[:, t] + gamma * lam * advantage_s
        columns.append(advantage_s)
    advantages_st = torch.stack(columns[::-1], dim=1) if columns else delta_st
    advantages_n = advantages_st[row_n, column_n]
    return advantages_n, advantages_n + values_n
