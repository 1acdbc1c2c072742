"""The critic's side of an update: values, and the steps towards the returns that they should have been.

    packs ─► values (by the critic as it is now) ─► (advantages, by the trainer) ─► returns ─► clipped value loss ─► AdamW step

Values are made at the start of the update that trains on them, not stored when tokens are sampled: they are those of the
present critic, on tokens of policies that may be older.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.losses import clipped_value_loss, explained_variance
from asyncrl.config import CriticSpec
from asyncrl.learn.batch import make_packs
from asyncrl.learn.metrics import spread
from asyncrl.learn.optimizer import Optimization, learning_rate, step
from asyncrl.learn.update import Minibatch, RefusedSteps, Sums, Update
from asyncrl.models.packed import Pack, TokenSequence
from asyncrl.models.value import OwnValues, SharedValues


class Critic:
    """Owns a value function (or the head of a shared one), its optimizer and schedule."""

    def __init__(
        self, values: OwnValues | SharedValues | None, spec: CriticSpec, refused: RefusedSteps, *, total_steps: int
    ) -> None:
        """values: None where other ranks hold the critic: then all that it makes is what they tell."""
        self.shared = values if isinstance(values, SharedValues) else None  # the head, if it is one on the policy
        self.optimization = Optimization(values.module, spec, total_steps, "critic.lr") if values is not None else None
        self.value_coef = spec.value_coef
        self.values = values
        self._spec = spec
        self._refused = refused
        self._total_steps = total_steps

    @property
    def packs(self) -> int:
        """Packs that its own model was given so far."""
        return self.values.packs if self.values is not None else 0

    def alone(self, update: Update) -> bool:
        """Whether only the critic learns in this update."""
        return update.number <= self._spec.critic_warmup

    def score(self, update: Update, packs: Sequence[Pack]) -> None:
        """Fills the update's values. (A head on the policy gets them from the policy's own pass: Actor.score.)"""
        if isinstance(self.values, OwnValues):
            with update.timed("timing_s/values"), torch.no_grad():
                for pack in packs:
                    update.values_n[pack.flat_t] = self.values(pack)
                self.values.ranks.merge_(update.values_n)

    def score_ends(self, update: Update, max_tokens: int) -> None:
        """Fills V [S], float64 on the CPU, after the last token of each of the batch's rollouts that were cut by length.

        S is of all rollouts, as in the batch's outcomes. It takes a pass of its own over those that were cut: other values are
        made without the last token, from which nothing is predicted.
        """
        if self.values is None:
            return
        batch = update.batch
        cut = [sequence for sequence, was_cut in zip(batch.sequences, batch.cut, strict=True) if was_cut]
        # A token more, which is scored and so not read: before it is after the last.
        ends = [TokenSequence(np.append(s.ids, 0), np.array([len(s.ids)]), s.shared) for s in cut]
        values_e = torch.full((len(ends),), torch.nan, dtype=torch.float64, device=update.values_n.device)
        with update.timed("timing_s/values"), torch.no_grad():
            for pack in make_packs(ends, range(len(ends)), max_tokens, values_e.device, self.values.ranks):
                values_e[pack.flat_t] = self.values(pack).double()
            values_s = self.values.ranks.merge_(values_e).cpu()
        update.ends_s.index_put_((batch.rollouts_s.cpu()[torch.from_numpy(batch.cut)],), values_s)

    def train(self, update: Update, minibatches: Sequence[Minibatch]) -> None:
        """Steps of the critic by itself: ppo_epochs over the minibatches."""
        if self.values is None or self.optimization is None:
            return
        with update.timed("timing_s/update_critic"):
            for members, packs in [*minibatches] * self._spec.ppo_epochs:
                totals = Sums()
                for pack in packs:
                    loss, sums = self.loss(update, members, pack, self.values(pack))
                    loss.backward()
                    totals.add(sums)
                figures = totals.over(self.values.ranks)
                (norm,), cause = step(figures["vf_loss"], self.optimization)
                self._refused.settle(update, members, cause and f"critic: {cause}", figures, {update.critic: norm})

    def loss(self, update: Update, members: Sequence[int], pack: Pack, values_t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This pack's share of the minibatch's mean loss per token (a scalar to sum over packs), and sums for the metrics."""
        old_t, returns_t = update.values_n[pack.flat_t], update.returns_n[pack.flat_t]
        loss_t, clipped_t = clipped_value_loss(values_t, old_t, returns_t, self._spec.value_clip)
        loss = loss_t.sum() / update.batch.counts_s[members].sum()
        return loss, {"vf_loss": loss.detach(), "vf_clipped": clipped_t.sum(), "vf_tokens": values_t.new_tensor(len(values_t))}

    def metrics(self, update: Update) -> dict[str, float]:
        """vf_loss and grad_norm: mean over steps. Values are those at the start; explained_var too: before they learned."""
        steps = update.critic
        figures = {
            "critic/lr": learning_rate(self._spec, update.number - 1, self._total_steps),
            "critic/optimizer_steps": float(steps.accepted),
            "critic/refused_steps": float(steps.refused),
        }
        if steps.accepted:
            figures["critic/vf_loss"] = steps.sums["vf_loss"] / steps.accepted
            figures["critic/vf_clipfrac"] = steps.sums["vf_clipped"] / steps.sums["vf_tokens"]
            figures["critic/grad_norm"] = steps.sums["grad_norm"] / steps.accepted
        if len(update.values_n):
            figures |= spread("critic/values", update.values_n) | spread("critic/returns", update.returns_n)
            figures["critic/values_mean"] = figures["critic/values/mean"]  # as they were called before
            figures["critic/returns_mean"] = figures["critic/returns/mean"]
        explained = explained_variance(update.values_n, update.returns_n)
        return figures if explained is None else {**figures, "critic/vf_explained_var": explained}
