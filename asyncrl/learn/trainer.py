"""One update of the policy from one batch of scored rollouts. No store, no bus, no clock but for its own timings.

    rollouts ─► make_batch ─► packs ─► proximal (and reference) logprobs, values ─► advantages, once per batch
                                 └──► per minibatch and epoch: forward, objective, backward over its packs ─► AdamW step

Several ranks run the same program on the same rollouts. Each makes the passes over its share's packs; the columns that they
score are merged, a step's sums and gradients added up. All else, advantages, coefficients, whether a step is refused, each
makes itself, from what is then the same on all. So are the metrics, but for timings and `packs`, which are this rank's.

Deterministic: the same model, rollouts and count give the same bits, on the same number of ranks and threads.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from asyncrl.algorithms.advantages import advantages
from asyncrl.algorithms.corrections import m2po
from asyncrl.algorithms.objective import AGGREGATIONS, Columns, loss_metrics, mean_weight, needs_proximal, objective
from asyncrl.algorithms.rewards import RewardNormalizer
from asyncrl.config import AlgorithmSpec, LearnerSpec
from asyncrl.errors import ConfigError
from asyncrl.learn.batch import make_batch, make_packs, minibatches
from asyncrl.learn.critic import Critic
from asyncrl.learn.kl_control import KLControl
from asyncrl.learn.metrics import correction_metrics, gap_metrics, rollout_metrics, staleness_metrics
from asyncrl.learn.optimizer import Optimization, step
from asyncrl.learn.preference_step import prefer, preference_metrics
from asyncrl.learn.update import Minibatch, RefusedSteps, Sums, Update
from asyncrl.models.packed import PackedModel
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout


class PolicyTrainer:
    """Owns the policy, its optimizer and, where the algorithm asks for one, a frozen reference (a copy of the starting policy).

    total_steps: updates over which the schedule runs. refused_dir: where batches of refused steps are kept. critic: with
    adv_estimator "gae". Logprobs are taken at the temperature of the policy and of the reference.
    """

    def __init__(
        self,
        policy: PackedModel,
        learner: LearnerSpec,
        algorithm: AlgorithmSpec,
        bound: Staleness,
        *,
        total_steps: int,
        refused_dir: Path,
        reference: PackedModel | None = None,
        critic: Critic | None = None,
    ) -> None:
        if algorithm.needs_reference and reference is None:
            asks = f"policy_loss={algorithm.policy_loss!r}" if algorithm.learns_preferences else f"kl_coef={algorithm.kl_coef}"
            raise ConfigError(f"algorithm.{asks} needs a reference model; load one, or set policy_loss='ppo' and kl_coef=0")
        if algorithm.needs_critic != (critic is not None):
            raise ConfigError(
                f"algorithm.adv_estimator={algorithm.adv_estimator!r} {'needs' if critic is None else 'has no use for'} a "
                "critic: advantages could not be made as the recipe says; pass a critic with 'gae', and only then"
            )
        self.model = policy.model
        self.critic = critic
        self._head = critic.shared if critic is not None else None
        self._optimization = Optimization(policy.model, learner, total_steps, "learner.lr")
        self.optimizer = self._optimization.adamw
        self._policy = policy
        self._ranks = ranks = policy.ranks
        self._reference = reference if algorithm.needs_reference else None
        self._learner = learner
        self._algorithm = algorithm
        self._rule = bound
        self._kl = KLControl(algorithm)
        self.state = self._kl.state  # figures for the checkpoint: the KL coefficient, where it adapts; moments of the rewards
        self._normalizer = RewardNormalizer(algorithm.reward_normalization, self.state)
        self._refused = RefusedSteps(refused_dir, learner.max_refused_steps, ranks.first)

    @property
    def packs(self) -> int:
        """Packs, dummies too, that this rank's models were given so far: what moves within an update. From any thread."""
        reference, critic = self._reference, self.critic
        return self._policy.packs + (reference.packs if reference else 0) + (critic.packs if critic else 0)

    def update(self, rollouts: Sequence[TrainRollout], committed: int) -> dict[str, float]:
        """Makes update `committed + 1` and returns its metrics; with nothing to train the weights stay as they are.

        Raises NonFinite after max_refused_steps refused optimizer steps in a row.
        """
        started = time.perf_counter()
        rate = self._optimization.schedule(committed)
        if self.critic is not None:
            self.critic.optimization.schedule(committed)
        batch = make_batch(rollouts, self._rule, committed)
        update = Update(batch.to(self._policy.device), committed + 1)
        steps = [
            (members, make_packs(batch.sequences, members, self._learner.max_tokens_per_pack, self._policy.device, self._ranks))
            for members in minibatches(batch.groups, self._learner.mini_batch_groups)
        ]
        self._score(update, steps)
        self._estimate(update)
        self._train(update, steps)
        update.merge(self._ranks)
        update.timings["timing_s/update"] = time.perf_counter() - started
        return {
            **rollout_metrics(rollouts),
            **staleness_metrics(rollouts, batch, self._rule, committed),
            **gap_metrics(batch, update.proximal_n.cpu()),
            **correction_metrics(batch.lag_n, *(column_n.cpu() for column_n in update.counted)),
            **({"correction/weight_mean": update.weight_mean} if self._algorithm.normalize_weights else {}),
            **loss_metrics(update.actor.sums, update.actor.accepted),
            **preference_metrics(update.actor.sums),
            **self._kl.control(update, len(rollouts) if update.actor.tried else 0),  # 0: while a critic learns alone
            **(self.critic.metrics(update) if self.critic is not None else {}),
            "actor/lr": rate,
            "actor/optimizer_steps": float(update.actor.accepted),
            "actor/refused_steps": float(update.actor.refused),
            **update.timings,
        }

    def _score(self, update: Update, steps: Sequence[Minibatch]) -> None:
        """What the models say at the start of the update: proximal and reference logprobs, and values, where needed."""
        spec, packs = self._algorithm, [pack for _, minibatch in steps for pack in minibatch]
        # A single step's own forward pass is made by the proximal policy: no extra pass is needed.
        several = len(steps) * self._learner.ppo_epochs > 1
        asked = "m2po" in spec.masks or spec.normalize_weights or spec.kl_in == "reward" or spec.learns_preferences
        asked |= self._head is not None
        update.recomputed = (several and needs_proximal(spec)) or asked
        with update.timed("timing_s/old_log_prob"), torch.no_grad():
            if self._head is not None:  # always `recomputed`: its values come of the same pass
                for pack in packs:
                    made = self._policy.forward(pack)
                    update.proximal_n[pack.flat_t] = made.logp_t
                    update.values_n[pack.flat_t] = self._head.of(made.hidden_th, pack)
                self._ranks.merge_(update.proximal_n)
                self._ranks.merge_(update.values_n)
            elif update.recomputed:
                self._policy.score(packs, update.proximal_n)
            if self._reference is not None:
                update.reference_n = self._reference.score(packs, torch.full_like(update.proximal_n, math.nan))
        if spec.normalize_weights:
            batch = update.batch
            update.weight_mean = mean_weight(spec, update.proximal_n, batch.behaviour_n, batch.sequence_n, batch.counts_s)
        if self.critic is not None and self._head is None:
            self.critic.score(update, packs)

    def _estimate(self, update: Update) -> None:
        """Makes the batch's advantages, and returns for a critic. (A preference loss makes its own, step by step.)"""
        spec, outcomes = self._algorithm, update.batch.outcomes
        if spec.learns_preferences:
            return
        outcomes = outcomes._replace(rewards_s=self._normalizer(outcomes.rewards_s))
        if spec.kl_in == "reward":
            outcomes = outcomes._replace(token_rewards_n=outcomes.token_rewards_n + self._kl.penalty(update))
        if self.critic is not None:
            outcomes = outcomes._replace(values_n=update.values_n.cpu().double())
        if self.critic is not None and spec.bootstrap_truncated:
            outcomes = outcomes._replace(ends_s=self.critic.after_cut(update, self._learner.max_tokens_per_pack))
        advantages_n, returns_n = advantages(spec, outcomes)
        update.advantages_n = advantages_n.to(update.advantages_n)
        if returns_n is not None:
            update.returns_n = returns_n.to(update.returns_n)

    def _train(self, update: Update, steps: Sequence[Minibatch]) -> None:
        """The steps of an own critic, and of the policy; while the critic warms up, of the critic (or its head) alone."""
        alone = self.critic is not None and self.critic.alone(update)
        if self.critic is not None and (alone or self._head is None):
            self.critic.train(update, steps)
        for _ in range(0 if alone else self._learner.ppo_epochs):
            for minibatch in steps:
                self._step(update, minibatch)

    def _step(self, update: Update, minibatch: Minibatch) -> None:
        """One optimizer step over a minibatch (a shared critic's with it), or none if anything in it is not finite."""
        members, _ = minibatch
        joint = {update.actor: self._optimization}
        if self.critic is not None and self._head is not None:
            joint[update.critic] = self.critic.optimization
        sums, norms, cause = {}, [math.nan] * len(joint), "a behaviour logprob is not finite"
        if update.batch.behaviour_n[update.batch.tokens_of(members)].isfinite().all():
            with update.timed("timing_s/forward_backward"):
                sums = self._backward(update, minibatch)
            with update.timed("timing_s/optimizer"):
                norms, cause = step(sums["loss"], *joint.values())
        self._refused.settle(update, members, cause, sums, dict(zip(joint, norms, strict=True)))

    def _backward(self, update: Update, minibatch: Minibatch) -> dict[str, float]:
        """Accumulates the minibatch's gradient pack by pack; returns sums over its tokens, the loss among them."""
        spec, (members, packs) = self._algorithm, minibatch
        coefficient_s = self._coefficients(update, members)
        preferred = prefer(spec, self._policy, update, minibatch, coefficient_s) if spec.learns_preferences else {}
        batch = update.batch
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
        totals = Sums()
        for pack in packs:
            logp_t, entropy_t, hidden_th = self._policy.forward(pack, entropy_grad=bool(spec.entropy_coef))
            if not update.recomputed and not update.actor.tried:
                update.proximal_n[pack.flat_t] = logp_t.detach()
            columns = columns_n.take(pack.flat_t)
            loss, sums, counted = objective(spec, columns, logp_t, entropy_t, self._kl.coef, update.weight_mean)
            if self.critic is not None and self._head is not None:
                value_loss, value_sums = self.critic.loss(update, members, pack, self._head.of(hidden_th, pack))
                loss, sums = loss + self.critic.value_coef * value_loss, {**sums, **value_sums}
            loss.backward()
            update.remember(pack, counted)
            totals.add({**sums, "loss": loss.detach()})
        return totals.over(self._ranks) | preferred

    def _coefficients(self, update: Update, members: Sequence[int]) -> Tensor:
        """What a token of each sequence weighs in this minibatch's loss [S]; 0 for sequences of other minibatches."""
        spec, coefficient_s = self._algorithm, torch.zeros_like(update.batch.counts_s)
        coefficient_s[members] = AGGREGATIONS[spec.setting("loss_agg")](spec, update.batch.counts_s[members])
        return coefficient_s

    @staticmethod
    def _keep(update: Update, members: Sequence[int], bound: float) -> Tensor:
        """What m2po leaves of a minibatch [N] bool; False outside of it."""
        flat_m = update.batch.tokens_of(members)
        kept_n = torch.zeros_like(update.counted.masked_t)
        kept_n[flat_m] = m2po(update.proximal_n[flat_m] - update.batch.behaviour_n[flat_m], bound)
        return kept_n
