"""The policy's side of an update: its logprobs, and the steps towards what the advantages favour.

packs ─► proximal logprobs (and values, of a head on the policy) ─► (advantages, by the trainer)
         per minibatch and epoch: forward, objective, backward over its packs ─► AdamW step
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import Columns, m2po
from asyncrl.algorithms.objective import AGGREGATIONS, objective
from asyncrl.config import AlgorithmSpec, LearnerSpec
from asyncrl.learn.critic import Critic
from asyncrl.learn.kl_control import KLControl
from asyncrl.learn.optimizer import Optimization, step
from asyncrl.learn.preference_step import prefer
from asyncrl.learn.update import Minibatch, RefusedSteps, Sums, Update
from asyncrl.models.packed import Pack, PackedModel


class Actor:
    """Owns the policy, its optimizer and schedule. critic: one whose head on the policy learns with it, or None."""

    def __init__(
        self,
        policy: PackedModel,
        learner: LearnerSpec,
        algorithm: AlgorithmSpec,
        kl: KLControl,
        *,
        total_steps: int,
        refused_dir: Path,
        critic: Critic | None,
    ) -> None:
        self.policy = policy
        self.optimization = Optimization(policy.model, learner, total_steps, "learner.lr")
        self._ranks = policy.ranks
        self._learner = learner
        self.algorithm = algorithm
        self.kl = kl
        self.before_step: Callable[[Update, Minibatch], None] | None = None  # sees the update as it is then; see learn.audit
        self._critic = critic
        self._head = critic.shared if critic is not None else None
        self._refused = RefusedSteps(refused_dir, learner.max_refused_steps, self._ranks.leads)

    def score(self, update: Update, packs: Sequence[Pack]) -> None:
        """Fills the update's proximal logprobs, if it recomputes them; and the values of a head on the policy, which it has."""
        with update.timed("timing_s/old_log_prob"), torch.no_grad():
            if self._head is not None:  # always `recomputed`: its values come of the same pass
                for pack in packs:
                    made = self.policy.forward(pack)
                    update.proximal_n[pack.flat_t] = made.logp_t
                    update.values_n[pack.flat_t] = self._head.of(made.hidden_th, pack)
                self._ranks.merge_(update.proximal_n)
                self._ranks.merge_(update.values_n)
            elif update.recomputed:
                self.policy.score(packs, update.proximal_n)

    def train(self, update: Update, minibatches: Sequence[Minibatch]) -> None:
        """Steps of the policy: ppo_epochs over the minibatches."""
        for minibatch in [*minibatches] * self._learner.ppo_epochs:
            self._step(update, minibatch)

    def _step(self, update: Update, minibatch: Minibatch) -> None:
        """One optimizer step over a minibatch (a shared critic's with it), or none if anything in it is not finite."""
        members, _ = minibatch
        joint = {update.actor: self.optimization}
        if self._head is not None and self._critic is not None and self._critic.optimization is not None:
            joint[update.critic] = self._critic.optimization
        sums, norms, cause = {}, [math.nan] * len(joint), "a behaviour logprob is not finite"
        if update.batch.behaviour_n[update.batch.tokens_of(members)].isfinite().all():
            if self.before_step is not None:
                self.before_step(update, minibatch)
            with update.timed("timing_s/forward_backward"):
                sums = self._backward(update, minibatch)
            with update.timed("timing_s/optimizer"):
                norms, cause = step(sums["loss"], *joint.values())
        self._refused.settle(update, members, cause, sums, dict(zip(joint, norms, strict=True)))

    def _backward(self, update: Update, minibatch: Minibatch) -> dict[str, float]:
        """Accumulates the minibatch's gradient pack by pack; returns sums over its tokens, the loss among them."""
        spec, (members, packs) = self.algorithm, minibatch
        columns_n, preferred = self.columns(update, minibatch)
        totals = Sums()
        for pack in packs:
            logp_t, entropy_t, hidden_th = self.policy.forward(pack, entropy_grad=bool(spec.entropy_coef))
            if not update.recomputed and not update.actor.tried:
                update.proximal_n[pack.flat_t] = logp_t.detach()  # which is also in columns_n
            columns = columns_n.take(pack.flat_t)
            loss, sums, counted = objective(spec, columns, logp_t, entropy_t, self.kl.coef, update.weight_mean)
            if self._critic is not None and self._head is not None:
                value_loss, value_sums = self._critic.loss(update, members, pack, self._head.of(hidden_th, pack))
                loss, sums = loss + self._critic.value_coef * value_loss, {**sums, **value_sums}
            loss.backward()
            update.remember(pack, counted)
            totals.add({**sums, "loss": loss.detach()})
        return totals.over(self._ranks) | preferred

    def columns(self, update: Update, minibatch: Minibatch) -> tuple[Columns, dict[str, float]]:
        """What a minibatch's loss reads of each token of the batch [N], as the update stands. A preference loss makes the
        advantages here: its sums come with them."""
        spec, batch, (members, _) = self.algorithm, update.batch, minibatch
        coefficient_s = self._coefficients(update, members)
        preferred = prefer(spec, self.policy, update, minibatch, coefficient_s) if spec.learns_preferences else {}
        columns_n = Columns(
            coefficients_t=coefficient_s[batch.sequence_n],
            advantages_t=update.advantages_n,
            behaviour_t=batch.behaviour_n,
            proximal_t=update.proximal_n,
            sequence_t=batch.sequence_n,
            lag_t=batch.lag_n,
            reference_t=update.reference_n if spec.kl_coef > 0 and spec.kl_in == "loss" else None,
            kept_t=self._keep(update, members, spec.m2po_bound) if "m2po" in spec.masks else None,
        )
        return columns_n, preferred

    def _coefficients(self, update: Update, members: Sequence[int]) -> Tensor:
        """What a token of each sequence weighs in this minibatch's loss [S]: what one of its rollout does; 0 for sequences of
        other minibatches."""
        batch, coefficient_s = update.batch, torch.zeros_like(update.batch.counts_s)
        rollouts_r, rollout_m = batch.rollouts_s[members].unique_consecutive(return_inverse=True)
        counts_r = coefficient_s.new_zeros(len(rollouts_r)).index_add(0, rollout_m, batch.counts_s[members])
        weigh = AGGREGATIONS[self.algorithm.setting("loss_agg")]
        coefficient_s[members] = weigh(self.algorithm, counts_r)[rollout_m]
        return coefficient_s

    @staticmethod
    def _keep(update: Update, members: Sequence[int], bound: float) -> Tensor:
        """What m2po leaves of a minibatch [N] bool; False outside of it."""
        flat_m = update.batch.tokens_of(members)
        kept_n = torch.zeros_like(update.counted.masked_t)
        kept_n[flat_m] = m2po(update.proximal_n[flat_m] - update.batch.behaviour_n[flat_m], bound)
        return kept_n
