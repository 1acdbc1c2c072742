"""Advantage estimators, by the names that a recipe has for them: from rewards to one advantage per trained token. Pure.

Estimators of rollouts compare the `ok` rollouts of a group: rewards_s [S] and groups_s [S] (any integer ids, in any order)
are parallel, and so is the result, in the same dtype. A group is what is there: evicted or failed members are not waited for,
and a group of one gets 0, having nothing to compare with. Equal rewards give 0 to all. The user's own is named in the recipe
as `file.py:name`, and is of this kind: `f(rewards_s, groups_s) -> advantages_s`, all [S], float64.

Estimators of tokens have the flat layout [N]: the trained tokens of all rollouts, sequence after sequence. sequence_n [N],
ascending: the rollout of each token. Tokens that are not trained are not there: returns and values go from one trained token
to the next. A rollout without a trained token has no entry, and none is needed.

To add one: its function and its line in ESTIMATORS here, its name in config/algorithm.py.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from asyncrl.algorithms.rewards import TIE, Outcomes, centered_in_groups, whitened
from asyncrl.config import AlgorithmSpec
from asyncrl.config.callables import load_callable
from asyncrl.errors import ConfigError

STD_EPS = 1e-6  # as in verl; keeps a group of all but equal rewards from exploding

# ------------------------------------------------------------------------------------------- rollouts


def grpo_no_std(rewards_s: Tensor, groups_s: Tensor) -> Tensor:
    """r − mean(group). Dr. GRPO (Liu et al. 2025): dividing by the spread favours questions that are too easy or too hard.

    Dr. GRPO as a whole also sums over tokens and divides by a constant: loss_agg="seq-mean-token-sum-norm".
    """
    return centered_in_groups(rewards_s, groups_s)[0]


def grpo(rewards_s: Tensor, groups_s: Tensor) -> Tensor:
    """(r − mean(group)) / (std(group) + 1e-6), std unbiased. GRPO (DeepSeekMath, Shao et al. 2024). A group of one gets 0."""
    centered_s, std_s = _spread(rewards_s, groups_s)
    return centered_s / (std_s + STD_EPS)


def _spread(rewards_s: Tensor, groups_s: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus their group's mean [S], and their group's standard deviation [S], unbiased; 0 for a group of one."""
    centered_s, index_s, count_g = centered_in_groups(rewards_s, groups_s)
    squares_g = rewards_s.new_zeros(len(count_g)).index_add(0, index_s, centered_s.square())
    return centered_s, (squares_g / (count_g - 1).clamp(min=1)).sqrt()[index_s]


def grpo_passk(rewards_s: Tensor, groups_s: Tensor) -> Tensor:
    """(best − second best) / (std(group) + 1e-6) for the best of a group, 0 for all others: what it adds to the best of k.

    k is the group's size. Tang et al. 2025 (arXiv 2503.19595), divided by the spread as in verl's `grpo_passk`. Two that are
    equally good add nothing.
    """
    order_s = rewards_s.argsort(descending=True, stable=True)
    order_s = order_s[groups_s[order_s].argsort(stable=True)]  # group after group, the best of each first
    ordered_s, same_s = rewards_s[order_s], groups_s[order_s].diff() == 0  # [S − 1]: whether one is of the group before it
    none = same_s.new_zeros(min(1, len(order_s)))
    best_s, has_second_s = ~torch.cat((none, same_s)), torch.cat((same_s, none))
    leads_s = torch.where(best_s & has_second_s, ordered_s - ordered_s.roll(-1), 0.0)
    return torch.zeros_like(rewards_s).index_put((order_s,), leads_s) / (_spread(rewards_s, groups_s)[1] + STD_EPS)


def gpg(rewards_s: Tensor, groups_s: Tensor) -> Tensor:
    """α·(r − mean(group)), α = rollouts of the batch / those whose group's rewards vary. GPG (Chu et al. 2025, F_norm = 1).

    Groups of equal rewards have no gradient, and a mean over the batch shrinks by them: α makes up for it. The paper's loss is
    policy_loss="pg". (verl's `gpg` counts the rewards that are not 0 instead, which is another number.)
    """
    centered_s, index_s, count_g = centered_in_groups(rewards_s, groups_s)
    zeros_g = rewards_s.new_zeros(len(count_g))
    size_g, apart_g = (zeros_g.index_add(0, index_s, of_s.abs()) for of_s in (rewards_s, centered_s))
    varied_s = (apart_g > TIE * size_g)[index_s]
    return centered_s * varied_s * len(rewards_s) / varied_s.sum().clamp(min=1)


def rloo(rewards_s: Tensor, groups_s: Tensor) -> Tensor:
    """r − mean of the others in the group, which is n/(n − 1)·(r − mean). RLOO (Ahmadian et al. 2024): an unbiased baseline."""
    centered_s, index_s, count_g = centered_in_groups(rewards_s, groups_s)
    factor_g = count_g.to(rewards_s.dtype) / (count_g - 1).clamp(min=1)
    return centered_s * factor_g[index_s]


def opo(rewards_s: Tensor, groups_s: Tensor, lengths_s: Tensor) -> Tensor:
    """r − Σ length·r / Σ length over the group. OPO (Hao et al. 2025): the baseline of least variance, gradients being as long
    as their responses.

    lengths_s [S]: tokens that the policy chose, trained or not. In a group without any, every rollout weighs the same.
    """
    _, index_s, count_g = torch.unique(groups_s, return_inverse=True, return_counts=True)
    zeros_g = rewards_s.new_zeros(len(count_g))
    lengths_s = lengths_s.to(rewards_s.dtype)
    empty_g = zeros_g.index_add(0, index_s, lengths_s) == 0
    weights_s = torch.where(empty_g[index_s], 1.0, lengths_s)
    baseline_g = zeros_g.index_add(0, index_s, weights_s * rewards_s) / zeros_g.index_add(0, index_s, weights_s)
    return rewards_s - baseline_g[index_s]


# -------------------------------------------------------------------------------------------- tokens


def gae(rewards_n: Tensor, values_n: Tensor, sequence_n: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Advantages [N]. GAE (Schulman et al. 2016): δ = r + γ·V(next) − V, A = Σ (γλ)^k·δ_k.

    rewards_n: of each token, the rollout's own reward at its last one. values_n: the critic's V before each token. After a
    sequence's last token comes nothing: V = 0. With λ = 1 and V = 0 everywhere it is the discounted return from each token on.
    """
    _, row_n, count_s = torch.unique_consecutive(sequence_n, return_inverse=True, return_counts=True)
    column_n = torch.arange(len(row_n), device=row_n.device) - (count_s.cumsum(0) - count_s)[row_n]
    shape = (len(count_s), int(count_s.max()) + 1 if len(count_s) else 1)  # the last column: V after the end

    def dense(flat_n: Tensor) -> Tensor:
        return flat_n.new_zeros(shape).index_put((row_n, column_n), flat_n)

    rewards_st, values_st = dense(rewards_n), dense(values_n)
    advantages_st = rewards_st[:, :-1] + gamma * values_st[:, 1:] - values_st[:, :-1]  # δ, until what follows is added
    for t in reversed(range(shape[1] - 2)):
        advantages_st[:, t] += gamma * lam * advantages_st[:, t + 1]
    return advantages_st[row_n, column_n]


def _earned(outcomes: Outcomes) -> Tensor:
    """What each trained token earned [N]: its own rewards, and at the last one of a rollout the rollout's."""
    earned_n = outcomes.token_rewards_n.clone()
    rollout_r, count_r = outcomes.sequence_n.unique_consecutive(return_counts=True)
    earned_n[count_r.cumsum(0) - 1] += outcomes.rewards_s[rollout_r]
    return earned_n


def _reinforce_plus_plus(spec: AlgorithmSpec, outcomes: Outcomes) -> Tensor:
    """The return from each token on, discounted by γ per trained token. REINFORCE++ (Hu et al. 2025). Needs no groups."""
    earned_n = _earned(outcomes)
    return gae(earned_n, torch.zeros_like(earned_n), outcomes.sequence_n, gamma=spec.gamma, lam=1.0)


def _remax(spec: AlgorithmSpec, outcomes: Outcomes) -> Tensor:
    """The return from each token on, minus the rewards of the greedy rollout of the same prompt. ReMax (Li et al. 2023).

    The baseline does not depend on what was sampled, so the gradient stays unbiased. As in verl it pays no KL. Needs no groups.
    """
    if outcomes.baselines_s is None:
        raise ConfigError(
            "algorithm.adv_estimator='remax' on rollouts without a baseline: there is nothing to compare them with; generate "
            "them with replay.plan.StorePlan(baseline=True)"
        )
    return _reinforce_plus_plus(spec, outcomes._replace(rewards_s=outcomes.rewards_s - outcomes.baselines_s))


def _gae(spec: AlgorithmSpec, outcomes: Outcomes) -> Tensor:
    """A rollout's reward is assigned to its last *trained* token, a token-level one to its own; as in verl.

    Tokens that are not trained (of tools, or too old) are not there: nothing is discounted over them. A rollout without a
    trained token teaches nothing, its reward included. Where ends were asked for, a rollout that was cut earns γ·V of its end
    more, as it would have gone on (partial-episode bootstrapping, Pardo et al. 2018; AReaL). No token is left out for it.
    """
    assert outcomes.values_n is not None, "advantages of values that were not made"
    ends_s = 0.0 if outcomes.ends_s is None else outcomes.ends_s
    earned_n = _earned(outcomes._replace(rewards_s=outcomes.rewards_s + spec.gamma * ends_s))
    return gae(earned_n, outcomes.values_n, outcomes.sequence_n, gamma=spec.gamma, lam=spec.lam)


# --------------------------------------------------------------------------------------------- by name

Estimator = Callable[[AlgorithmSpec, Outcomes], Tensor]


def per_rollout(function: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """Makes an estimator of tokens from one of rollouts: each token gets its rollout's advantage."""
    return lambda spec, outcomes: function(outcomes.total_s(), outcomes.groups_s)[outcomes.sequence_n]


ESTIMATORS: dict[str, Estimator] = {
    "grpo": per_rollout(grpo),
    "grpo_no_std": per_rollout(grpo_no_std),
    "grpo_passk": per_rollout(grpo_passk),
    "dr_grpo": per_rollout(grpo_no_std),
    "rloo": per_rollout(rloo),
    "opo": lambda spec, outcomes: opo(outcomes.total_s(), outcomes.groups_s, outcomes.lengths_s)[outcomes.sequence_n],
    "gpg": per_rollout(gpg),
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": per_rollout(grpo_no_std),  # REINFORCE++-baseline (Hu et al. 2025), by being whitened
    "gae": _gae,
    "remax": _remax,
}
WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae")  # over the batch's tokens


@cache
def estimator(name: str) -> Estimator:
    """A built-in estimator, or the user's. Raises ConfigError where a user's can't be loaded, or (later) gives no [S]."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    function = load_callable(name, "algorithm.adv_estimator")

    def checked(rewards_s: Tensor, groups_s: Tensor) -> Tensor:
        advantages_s = function(rewards_s, groups_s)
        if not isinstance(advantages_s, Tensor) or advantages_s.shape != rewards_s.shape:
            found = tuple(getattr(advantages_s, "shape", ())) or type(advantages_s).__name__
            raise ConfigError(
                f"algorithm.adv_estimator={name!r} returned {found} for {len(rewards_s)} rollouts: their advantages could not "
                f"be told apart; return one per rollout, a tensor of shape {tuple(rewards_s.shape)}"
            )
        return advantages_s

    return per_rollout(checked)


def advantages(spec: AlgorithmSpec, outcomes: Outcomes) -> tuple[Tensor, Tensor | None]:
    """The recipe's advantages [N]; and returns [N], which a critic learns: advantages before whitening + values, or None."""
    advantages_n = estimator(spec.adv_estimator)(spec, outcomes)
    returns_n = None if outcomes.values_n is None else advantages_n + outcomes.values_n
    return whitened(advantages_n) if spec.adv_estimator in WHITENED else advantages_n, returns_n
