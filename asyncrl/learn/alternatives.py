"""What other algorithms would have made of a batch: gradients at the very weights that the run had, beside the run's own.

own trainer ─► update ─► before each step ─► for each setting: forward ─► dL/dlogp per token ─┬─► of the tokens of lag 0 ─► ∇θ
                                                                                              └─► of lag 1, … ─► ∇θ
Nobody steps but the run's own trainer. A setting has advantages, columns and masks of its own, made at the start of the update
as the run made its own; where the run made several steps of a batch, each setting is asked at each of them.

The gradient of a token is (dL/dlogp_t)·∇logp_t, and likewise of its entropy: L over the whole minibatch, couplings within a
sequence included. So those of all lags add up to the whole. A value loss on a shared backbone is not part of L.

Memory: besides the trainer's, two vectors as long as the weights that learn, one more for each lag in the batch, and the graph
of one pack; however many settings there are. Time: for each setting a forward pass, and a backward pass for each lag.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.kl import k3
from asyncrl.algorithms.objective import objective
from asyncrl.learn.metrics import correction_metrics
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.learn.update import Minibatch, Update
from asyncrl.types import TrainRollout

QUARTERS = 4
_CHUNK = 1 << 22  # elements that are added up in float64 at a time

Figures = dict[str, float]


class Setting(NamedTuple):
    """An algorithm that is asked, and what it has made of the batch so far."""

    trainer: PolicyTrainer
    update: Update
    steps: Sequence[Minibatch]
    slopes_n: Tensor  # sums over steps of |dL/dlogp|
    figures: list[Figures]  # of each step


def audited_update(
    own: PolicyTrainer, others: Mapping[str, PolicyTrainer], rollouts: Sequence[TrainRollout], committed: int
) -> tuple[Figures, dict[str, Figures]]:
    """Makes update `committed + 1` by the run's own trainer; returns its metrics, and the figures of each setting by name, of
    the run's own by "".

    others: of build.other_trainer. The moments and coefficients that the own trainer keeps, they begin with too.
    """
    assert own.actor is not None, "asked of a rank without the policy"
    settings: dict[str, Setting] = {}
    for name, trainer in others.items():
        trainer.state |= {figure: value for figure, value in own.state.items() if figure in trainer.state}
        settings[name] = _setting(trainer, *trainer.prepare(rollouts, committed))

    def ask(update: Update, minibatch: Minibatch) -> None:
        if "" not in settings:
            settings[""] = _setting(own, update, [minibatch])
        step = update.actor.tried
        mine = _gradient(settings[""], minibatch)
        settings[""].figures.append(_figures(mine, mine.whole))
        for name in others:
            other = settings[name]
            found = _gradient(other, other.steps[step % len(other.steps)])
            other.figures.append(_figures(found, mine.whole))
            other.update.actor.accept({})  # as if it had stepped with the run

    own.actor.before_step = ask
    try:
        metrics = own.update(rollouts, committed)
    finally:
        own.actor.before_step = None
    return metrics, {name: _summary(setting, rollouts) for name, setting in settings.items()}


def _setting(trainer: PolicyTrainer, update: Update, steps: Sequence[Minibatch]) -> Setting:
    return Setting(trainer, update, steps, torch.zeros_like(update.batch.behaviour_n), [])


class Gradient(NamedTuple):
    """Of a minibatch: float32, as long as all weights that learn; and what of its tokens counts, by lag."""

    whole: Tensor
    by_lag: dict[int, Tensor]
    slopes: dict[int, float]  # sums of |dL/dlogp|


def _gradient(setting: Setting, minibatch: Minibatch) -> Gradient:
    actor, update = setting.trainer.actor, setting.update
    assert actor is not None, "asked of a rank without the policy"
    weights = [weight for weight in actor.policy.model.parameters() if weight.requires_grad]
    whole = torch.zeros(sum(weight.numel() for weight in weights), device=update.batch.behaviour_n.device)
    by_lag: defaultdict[int, Tensor] = defaultdict(lambda: torch.zeros_like(whole))
    slopes: defaultdict[int, float] = defaultdict(float)
    columns_n, _ = actor.columns(update, minibatch)
    for pack in minibatch[1]:
        made = actor.policy.forward(pack, entropy_grad=bool(actor.algorithm.entropy_coef))
        if not update.recomputed and not update.actor.tried:
            update.proximal_n[pack.flat_t] = made.logp_t.detach()
        scored = [made_t for made_t in (made.logp_t, made.entropy_t) if made_t.requires_grad]
        cut = made.logp_t.detach().requires_grad_(), made.entropy_t.detach().requires_grad_()
        columns = columns_n.take(pack.flat_t)
        loss, _, counted = objective(actor.algorithm, columns, cut[0], cut[1], actor.kl.coef, update.weight_mean)
        update.remember(pack, counted)
        slope = torch.autograd.grad(loss, cut, allow_unused=True, materialize_grads=True)
        setting.slopes_n[pack.flat_t] += slope[0].abs()
        lag_t = update.batch.lag_n[pack.flat_t]
        for lag in lag_t.unique().tolist():
            chosen_t = lag_t == lag
            slopes[lag] += float(slope[0][chosen_t].abs().double().sum())
            sloped = [of * chosen_t for of in slope[: len(scored)]]
            _add(by_lag[lag], torch.autograd.grad(scored, weights, sloped, retain_graph=True, allow_unused=True), weights)
    for part in by_lag.values():
        whole += part
    return Gradient(whole, dict(sorted(by_lag.items())), dict(slopes))


def _add(total: Tensor, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
    """Adds gradients of all weights, end to end."""
    for part, gradient in zip(total.split([weight.numel() for weight in weights]), gradients, strict=True):
        if gradient is not None:
            part += gradient.reshape(-1)


def dot(one: Tensor, other: Tensor) -> float:
    """The scalar product, in float64."""
    return sum(float(a.double() @ b.double()) for a, b in zip(one.split(_CHUNK), other.split(_CHUNK), strict=True))


def _cosine(one: Tensor, other: Tensor) -> float:
    """NaN where one of them is 0."""
    lengths = math.sqrt(dot(one, one) * dot(other, other))
    return dot(one, other) / lengths if lengths else math.nan


def _figures(found: Gradient, own: Tensor) -> Figures:
    """Of a step. own: the gradient of the run's own algorithm. *_lag_*: of the part that the tokens of one lag make."""
    slopes = sum(found.slopes.values())
    figures = {"gradient/norm": math.sqrt(dot(found.whole, found.whole)), "gradient/cosine": _cosine(found.whole, own)}
    for lag, part in found.by_lag.items():
        figures[f"gradient/norm_lag_{lag}"] = math.sqrt(dot(part, part))
        figures[f"gradient/cosine_lag_{lag}"] = _cosine(part, own)
        figures[f"gradient/weight_lag_{lag}"] = found.slopes[lag] / slopes if slopes else math.nan
        if 0 in found.by_lag:
            figures[f"gradient/cosine_to_fresh_lag_{lag}"] = _cosine(part, found.by_lag[0])
    return figures


def _summary(setting: Setting, rollouts: Sequence[TrainRollout]) -> Figures:
    """The figures of an update: of its steps on average; of corrections and masks as its last epoch had them."""
    update, batch = setting.update, setting.update.batch
    counted = [column_n.cpu() for column_n in update.counted[:3]]
    lengths = np.array([int(r.loss_mask.sum()) for r in rollouts])
    rollout_n = batch.rollouts_s[batch.sequence_n].cpu()
    return {
        **mean_figures(setting.figures),
        **correction_metrics(batch.lag_n.cpu(), *counted),
        **_distance(update, counted[2]),
        **length_shares(lengths, rollout_n.numpy(), setting.slopes_n.cpu().double().numpy()),
    }


def _distance(update: Update, masked_n: Tensor) -> Figures:
    """Estimates of KL(behaviour ‖ proximal), over the tokens that no mask leaves out."""
    proximal_n, behaviour_n = update.proximal_n.cpu(), update.batch.behaviour_n.cpu()
    left_n = ~masked_n & proximal_n.isfinite() & behaviour_n.isfinite()
    if not left_n.any():
        return {}
    k3_n = k3(behaviour_n[left_n], proximal_n[left_n])
    return {"gap/k1": float((behaviour_n - proximal_n)[left_n].double().mean()), "gap/k3": float(k3_n.double().mean())}


def length_shares(lengths: np.ndarray, rollout_n: np.ndarray, slopes_n: np.ndarray) -> Figures:
    """Of the gradient's weight, Σ|dL/dlogp|, the share that each quarter of the rollouts has, from the shortest to the longest
    responses; and of the trained tokens. Rollouts without a trained token don't count; those of one length share alike.

    lengths [S]: tokens that the policy chose; rollout_n [N]: the rollout of each trained token; slopes_n [N] >= 0.
    """
    figures: Figures = {}
    trained = np.unique(rollout_n)
    order = trained[np.argsort(lengths[trained], kind="stable")]
    for name, values_n in (("weight", slopes_n), ("tokens", np.ones(len(rollout_n)))):
        of_rollouts = np.bincount(rollout_n, values_n, len(lengths))[order]
        _, same = np.unique(lengths[order], return_inverse=True)
        evened = (np.bincount(same, of_rollouts) / np.bincount(same))[same]
        total = evened.sum()
        edges = np.linspace(0, len(order), QUARTERS + 1)
        summed = np.interp(edges, np.arange(len(order) + 1), np.concatenate(([0.0], np.cumsum(evened))))
        for quarter, share in enumerate(np.diff(summed), 1):
            figures[f"length/{name}_q{quarter}"] = float(share / total) if total else math.nan
    return figures


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def mean_figures(found: Sequence[Figures]) -> Figures:
    """Means over the steps, or updates, that have a figure."""
    named = dict.fromkeys(name for figures in found for name in figures)
    return {name: _mean([figures[name] for figures in found if name in figures]) for name in named}
