"""Figures about a batch, under the names users know. Pure."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.kl import k3
from asyncrl.algorithms.rewards import Outcomes
from asyncrl.learn.batch import TrainBatch
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout


def rollout_metrics(rollouts: Sequence[TrainRollout]) -> dict[str, float]:
    """Rewards (and their named parts) and response lengths of every rollout of the batch, trained or masked. Of an episode the
    tokens count that the policy chose.

    reward/mean is of the rollouts' own rewards; reward/token_sum, where there are token-level ones, the mean of their sums;
    reward/baseline, where there are greedy rollouts, the mean over prompts of all that these earned.
    """
    if not rollouts:
        return {}
    rewards = np.array([r.reward for r in rollouts])
    lengths = np.array([_chosen(r) for r in rollouts])
    prompts = np.array([len(r.prompt_ids) for r in rollouts])
    parts: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.parts.items():
            parts.setdefault(name, []).append(value)
    if any(r.token_rewards is not None for r in rollouts):
        parts["token_sum"] = [0.0 if r.token_rewards is None else float(r.token_rewards.sum()) for r in rollouts]
    if baselines := {r.group: r.baseline for r in rollouts if r.baseline is not None}:
        parts["baseline"] = list(baselines.values())
    return {
        **{f"reward/{name}": float(np.mean(values)) for name, values in parts.items()},
        "samples": float(len(rollouts)),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/min": float(lengths.min()),
        "response_length/clip_ratio": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "prompt_length/mean": float(prompts.mean()),
        "prompt_length/max": float(prompts.max()),
        "prompt_length/min": float(prompts.min()),
        "perf/total_num_tokens": float(prompts.sum() + sum(len(r.response_ids) for r in rollouts)),
    }


def score_metrics(rollouts: Sequence[TrainRollout], outcomes: Outcomes) -> dict[str, float]:
    """All that the rollouts earned, token-level rewards included, and the share of groups whose rollouts all earned the same:
    they teach nothing to an estimator that compares within groups. outcomes: of these rollouts.

    Where the batch is of several data sources, also by source: rollouts, their own rewards, lengths, cut responses and that
    share.
    """
    if not rollouts:
        return {}
    _, index_s = outcomes.groups_s.unique(return_inverse=True)
    best_g, worst_g = (_by_group(outcomes.ranked_s, index_s, reduce) for reduce in ("amax", "amin"))
    equal_s = (best_g == worst_g)[index_s].numpy()
    figures = spread("critic/score", outcomes.ranked_s)
    figures["frac_reward_zero_std"] = float((best_g == worst_g).double().mean())
    by_source: dict[str, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        by_source.setdefault(rollout.data_source, []).append(place)
    for source, places in by_source.items() if len(by_source) > 1 else ():
        chosen = [rollouts[place] for place in places]
        figures |= {
            f"samples/{source}": float(len(chosen)),
            f"reward/mean/{source}": float(np.mean([r.reward for r in chosen])),
            f"response_length/mean/{source}": float(np.mean([_chosen(r) for r in chosen])),
            f"response_length/clip_ratio/{source}": sum(r.finish_reason == "length" for r in chosen) / len(chosen),
            f"frac_reward_zero_std/{source}": float(equal_s[places].mean()),
        }
    return figures


def _by_group(rewards_s: Tensor, index_s: Tensor, reduce: str) -> Tensor:
    """The largest (`amax`) or smallest of each group's rewards [G]."""
    return rewards_s.new_zeros(int(index_s.max()) + 1).scatter_reduce(0, index_s, rewards_s, reduce, include_self=False)


def spread(name: str, values: Tensor) -> dict[str, float]:
    """Mean, largest and smallest of the values that are known; nothing of none."""
    known = values[values.isfinite()].double()
    if not len(known):
        return {}
    return {f"{name}/mean": float(known.mean()), f"{name}/max": float(known.max()), f"{name}/min": float(known.min())}


def advantage_metrics(advantages_n: Tensor, rewards_s: Tensor | None) -> dict[str, float]:
    """Advantages of the trained tokens [N], and the rewards [S] that they were made of: normalized, and with the KL penalty,
    where the recipe says so. None, of a preference loss, has neither."""
    if rewards_s is None or not len(advantages_n):
        return {}
    std = float(advantages_n.double().std(correction=0))
    return {**spread("critic/advantages", advantages_n), "critic/advantages/std": std, **spread("critic/rewards", rewards_s)}


def ratio_metrics(ratio_n: Tensor) -> dict[str, float]:
    """Of the tokens as they were last trained. ratio_n [N]: NaN where no step was made."""
    figures = spread("actor/ratio", ratio_n)
    return {name: figures[name] for name in ("actor/ratio/mean", "actor/ratio/max") if name in figures}


def staleness_metrics(rollouts: Sequence[TrainRollout], batch: TrainBatch, rule: Staleness, committed: int) -> dict[str, float]:
    """Lags of the trained tokens (share per lag, mean, largest), and what masking cost. batch: made of the rollouts, with the
    same rule and `committed`.

    masked_share: policy tokens too old to train; masked_head_share: the same of the first quarter of long responses, those of
    the longest quarter of the batch. dispatched_length and trained_length: mean response length of all rollouts leased, and of
    those with a trained token; they differ if staleness favours short responses.
    """
    policy_tokens = sum(_chosen(r) for r in rollouts)
    if not policy_tokens:
        return {}
    tokens = len(batch.lag_n)
    heads = _long_heads(rollouts)
    head_tokens = sum(len(head) for head in heads)
    trained_heads = sum(int(rule.trainable(head, committed).sum()) for head in heads)
    figures = {
        "tokens/policy": float(policy_tokens),
        "tokens/trained": float(tokens),
        "tokens/head": float(head_tokens),
        "tokens/head_trained": float(trained_heads),
        "staleness/masked_share": 1.0 - tokens / policy_tokens,
        "staleness/masked_head_share": 1.0 - trained_heads / max(1, head_tokens),
        "staleness/dispatched_length": float(np.mean([_chosen(r) for r in rollouts])),
    }
    if tokens:
        count_by_lag = torch.bincount(batch.lag_n).tolist()
        figures |= {f"staleness/lag_{lag}": count / tokens for lag, count in enumerate(count_by_lag)}
        figures["staleness/lag_mean"] = float(batch.lag_n.double().mean())
        figures["staleness/lag_max"] = float(len(count_by_lag) - 1)
        trained = batch.rollouts_s.unique_consecutive().tolist()
        figures["staleness/trained_length"] = float(np.mean([_chosen(rollouts[i]) for i in trained]))
    return figures


def _chosen(rollout: TrainRollout) -> int:
    """Tokens that the policy chose."""
    return int(rollout.loss_mask.sum())


def _long_heads(rollouts: Sequence[TrainRollout]) -> list[np.ndarray]:
    """Updates of the policy's tokens in the first quarter (at least one token) of the longest quarter of the responses."""
    by_length = sorted(rollouts, key=lambda r: len(r.response_ids), reverse=True)
    long = by_length[: math.ceil(len(by_length) / 4)]
    return [r.updates[:head][r.loss_mask[:head].astype(bool)] for r in long for head in [math.ceil(len(r.response_ids) / 4)]]


def gap_metrics(batch: TrainBatch, proximal_n: Tensor) -> dict[str, float]:
    """Learner against generator. proximal_n [N]: logprobs at the start of the update; NaN where none were computed.

    On tokens of lag 0 both sides hold the same weights: their difference is engine error alone, and must stay flat.
    gap/k3 over all tokens estimates KL(behaviour ‖ proximal), staleness included; gap/k3_lag_* the same by lag. gap/ess: the
    effective sample size (Σw)²/(N·Σw²) of w = exp(proximal − behaviour), as a share of the tokens; no correction cuts these.
    """
    delta_n = proximal_n - batch.behaviour_n
    known_n = delta_n.isfinite()
    if not known_n.any():
        return {}
    k3_n = k3(batch.behaviour_n, proximal_n)[known_n]
    delta_n, lag_n = delta_n[known_n], batch.lag_n[known_n]
    weights_n = delta_n.double().clamp(-20, 20).exp()
    figures = {"gap/k3": float(k3_n.mean()), "gap/ess": float(weights_n.mean().square() / weights_n.square().mean())}
    figures |= {f"gap/k3_lag_{lag}": float(k3_n[lag_n == lag].mean()) for lag in lag_n.unique().tolist()}
    fresh = delta_n[lag_n == 0].abs()
    if len(fresh):
        figures["gap/logprob_mean_abs"] = float(fresh.mean())
        figures["gap/logprob_max_abs"] = float(fresh.max())
    return figures


def correction_metrics(lag_n: Tensor, weights_n: Tensor, capped_n: Tensor, masked_n: Tensor) -> dict[str, float]:
    """How much of the batch the off-policy correction leaves, over all tokens and by lag; as of their last epoch.

    weights_n [N]: 0 where masked, NaN where no step was made. ess: effective sample size (Σw)²/(N·Σw²), as a share of the
    tokens; 0 if all are masked. cap_share: weights that were truncated. masked_share: tokens that a mask left out.
    """
    made_n = weights_n.isfinite()
    weights_n, lag_n = weights_n[made_n].double(), lag_n[made_n]
    shares = {"cap_share": capped_n[made_n].double(), "masked_share": masked_n[made_n].double()}
    figures = {}
    for suffix, chosen_n in [("", lag_n >= 0), *((f"_lag_{lag}", lag_n == lag) for lag in lag_n.unique().tolist())]:
        if chosen_n.any():
            chosen = weights_n[chosen_n]
            squares = float(chosen.square().sum())
            figures[f"correction/ess{suffix}"] = float(chosen.sum()) ** 2 / (len(chosen) * squares) if squares else 0.0
            figures |= {f"correction/{name}{suffix}": float(share_n[chosen_n].mean()) for name, share_n in shares.items()}
    return figures
