"""One update of the policy from one batch of scored rollouts. No store, no bus, no clock but for its own timings.

    rollouts ─► make_batch ─► packs ─► Actor, reference, Critic: logprobs and values ─► advantages, once per batch
                                 └──► Critic, Actor: their steps

Several ranks run the same program on the same rollouts. Each makes the passes over its share's packs; the columns that they
score are merged, a step's sums and gradients added up. All else, advantages, coefficients, whether a step is refused, each
makes itself, from what is then the same on all. So are the metrics, but for timings and `packs`, which are this rank's.

Where ranks of their own hold the critic or the reference model, each rank is the trainer of what it holds: all passes of a
kind are made side by side, then what came of them is told to all.

Deterministic: the same model, rollouts and count give the same bits, on the same number of ranks and threads.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from asyncrl.algorithms.advantages import advantages
from asyncrl.algorithms.objective import loss_metrics, mean_weight, needs_proximal
from asyncrl.algorithms.rewards import RewardNormalizer
from asyncrl.config import AlgorithmSpec, LearnerSpec
from asyncrl.errors import ConfigError
from asyncrl.learn.actor import Actor
from asyncrl.learn.batch import TrainBatch, make_batch, make_packs, minibatches
from asyncrl.learn.cost import cost_metrics, flops_utilization
from asyncrl.learn.critic import Critic
from asyncrl.learn.kl_control import KLControl
from asyncrl.learn.metrics import (
    advantage_metrics,
    correction_metrics,
    gap_metrics,
    ratio_metrics,
    rollout_metrics,
    score_metrics,
    staleness_metrics,
)
from asyncrl.learn.optimizer import Optimization, learning_rate
from asyncrl.learn.preference_step import preference_metrics
from asyncrl.learn.update import Minibatch, Update
from asyncrl.models.packed import PackedModel, TokenSequence
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout


class PolicyTrainer:
    """Owns the policy, its optimizer and, where the algorithm asks for one, a frozen reference (a copy of the starting policy).

    policy, reference: None where other ranks hold it; a rank holds something. critic: with adv_estimator "gae". total_steps:
    updates over which the schedule runs. refused_dir: where batches of refused steps are kept. Logprobs are taken at the
    temperature of the policy and of the reference.
    """

    def __init__(
        self,
        policy: PackedModel | None,
        learner: LearnerSpec,
        algorithm: AlgorithmSpec,
        bound: Staleness,
        *,
        total_steps: int,
        refused_dir: Path,
        reference: PackedModel | None = None,
        critic: Critic | None = None,
    ) -> None:
        values = critic.values if critic is not None else None
        held = next(model for model in (policy, reference, values) if model is not None)
        self._ranks = ranks = held.ranks
        self._device = held.device
        if algorithm.needs_reference and reference is None and ranks.holds("reference"):
            asks = f"policy_loss={algorithm.policy_loss!r}" if algorithm.learns_preferences else f"kl_coef={algorithm.kl_coef}"
            raise ConfigError(f"algorithm.{asks} needs a reference model; load one, or set policy_loss='ppo' and kl_coef=0")
        if algorithm.needs_critic != (critic is not None):
            raise ConfigError(
                f"algorithm.adv_estimator={algorithm.adv_estimator!r} {'needs' if critic is None else 'has no use for'} a "
                "critic: advantages could not be made as the recipe says; pass a critic with 'gae', and only then"
            )
        self._kl = KLControl(algorithm)
        self.state = self._kl.state  # figures for the checkpoint: the KL coefficient, where it adapts; moments of the rewards
        self._normalizer = RewardNormalizer(algorithm.reward_normalization, self.state)
        self.critic = critic
        self.reference = reference if algorithm.needs_reference else None
        self.actor: Actor | None = None
        self.trained: dict[str, Optimization] = {}  # what this rank trains
        if policy is not None:
            self.actor = Actor(
                policy, learner, algorithm, self._kl, total_steps=total_steps, refused_dir=refused_dir, critic=critic
            )
            self.trained["policy"] = self.actor.optimization
        if critic is not None and critic.optimization is not None:
            self.trained["critic"] = critic.optimization
        self._learner = learner
        self.algorithm = algorithm
        self._rule = bound
        self._total_steps = total_steps

    @property
    def model(self) -> PreTrainedModel:
        """The policy, or what this rank has of it, where it has some."""
        model: PreTrainedModel = self.trained["policy"].module
        return model

    @property
    def packs(self) -> int:
        """Packs, dummies too, that this rank's models were given so far: what moves within an update. From any thread."""
        policy = self.actor.policy if self.actor is not None else None
        return sum(model.packs for model in (policy, self.reference, self.critic) if model is not None)

    def holds(self) -> dict[str, float]:
        """What this rank keeps between updates, in bytes by name (AdamW's moments come with the first step); and how many
        parameters the policy has, on all ranks, and of them are trained."""
        figures: dict[str, float] = {}
        critic = self.critic.values.module if self.critic is not None and self.critic.values is not None else None
        referred = self.reference.model if self.reference is not None else None
        models = {"policy": self.actor.policy.model if self.actor else None, "reference": referred, "critic": critic}
        counted = set()
        for name, model in models.items():
            own = [] if model is None else [weight for weight in model.parameters() if id(weight) not in counted]
            counted |= {id(weight) for weight in own}
            figures[f"{name}_bytes"] = float(sum(map(_local_bytes, own)))
            if name in self.trained:
                trained = [weight for weight in own if weight.requires_grad]
                figures[f"{name}_moments_bytes"] = 2.0 * sum(map(_local_bytes, trained))
                if name == "policy":
                    figures["parameters"] = float(sum(weight.numel() for weight in own))
                    figures["trained_parameters"] = float(sum(weight.numel() for weight in trained))
        return {name: value for name, value in figures.items() if value}

    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """What the policy gives each token of a response, in nats, at the sampling's temperature. All of its ranks must call
        it; those without a part of it know nothing."""
        if self.actor is None:
            return []
        ids = np.array([*prompt_ids, *response_ids], dtype=np.int64)
        sequence = TokenSequence(ids, np.arange(len(prompt_ids), len(ids)))
        packs = make_packs([sequence], [0], self._learner.max_tokens_per_pack, self._device, self._ranks)
        made: list[float] = self.actor.policy.score(
            packs, torch.full((len(response_ids),), math.nan, device=self._device)
        ).tolist()
        return made

    def update(self, rollouts: Sequence[TrainRollout], committed: int) -> dict[str, float]:
        """Makes update `committed + 1` and returns its metrics; with nothing to train the weights stay as they are.

        Raises NonFinite after max_refused_steps refused optimizer steps in a row.
        """
        started = time.perf_counter()
        for optimization in self.trained.values():
            optimization.schedule(committed)
        update, steps = self.prepare(rollouts, committed)
        self._train(update, steps)
        with update.timed("timing_s/wait_ranks"):
            update.merge(self._ranks)
        with update.timed("timing_s/metrics"):
            batch = update.batch.to(torch.device("cpu"))
            metrics = self._metrics(update, rollouts, batch, committed) | self._cost(update, steps)
        taken_s = time.perf_counter() - started
        timings = {"timing_s/update": taken_s, "timing_s/unaccounted": taken_s - sum(update.timings.values())}
        return metrics | update.beside | update.timings | timings

    def _metrics(self, update: Update, rollouts: Sequence[TrainRollout], batch: TrainBatch, committed: int) -> dict[str, float]:
        """What came of an update, the same on all ranks. batch: on the CPU."""
        return {
            **rollout_metrics(rollouts),
            **score_metrics(rollouts, batch.outcomes),
            **advantage_metrics(update.advantages_n, update.rewards_s),
            **staleness_metrics(rollouts, batch, self._rule, committed),
            **gap_metrics(batch, update.proximal_n.cpu()),
            **correction_metrics(batch.lag_n, *(column_n.cpu() for column_n in update.counted[:3])),
            **ratio_metrics(update.counted.ratio_t),
            **({"correction/weight_mean": update.weight_mean} if self.algorithm.normalize_weights else {}),
            **loss_metrics(update.actor.sums, update.actor.accepted),
            **preference_metrics(update.actor.sums),
            **self._kl.control(update, len(rollouts) if update.actor.tried else 0),  # 0: while a critic learns alone
            **(self.critic.metrics(update) if self.critic is not None else {}),
            "actor/lr": learning_rate(self._learner, committed, self._total_steps),
            "actor/optimizer_steps": float(update.actor.accepted),
            "actor/refused_steps": float(update.actor.refused),
        }

    def _cost(self, update: Update, steps: Sequence[Minibatch]) -> dict[str, float]:
        """What the update took of the devices. All ranks must call it."""
        packs = [pack for _, minibatch in steps for pack in minibatch] * self._learner.ppo_epochs
        trained_s = sum(update.timings.get(f"timing_s/{part}", 0.0) for part in ("forward_backward", "optimizer"))
        policy = self.actor.policy if self.actor is not None and trained_s else None
        utilization = flops_utilization(policy, packs, trained_s) if policy is not None else 0.0
        return cost_metrics(self._ranks, self._device, utilization)

    def prepare(self, rollouts: Sequence[TrainRollout], committed: int) -> tuple[Update, list[Minibatch]]:
        """Update `committed + 1` as it is before its first step, scored and with its advantages; and its minibatches."""
        began = time.perf_counter()
        batch = make_batch(rollouts, self._rule, committed)
        update = Update(batch.to(self._device), committed + 1)
        steps: list[Minibatch] = [
            (members, make_packs(batch.sequences, members, self._learner.max_tokens_per_pack, self._device, self._ranks))
            for members in minibatches(batch.groups, self._learner.mini_batch_groups)
        ]
        update.timings["timing_s/pack"] = time.perf_counter() - began
        self._score(update, steps)
        with update.timed("timing_s/adv"):
            self._estimate(update)
        return update, steps

    def _score(self, update: Update, steps: Sequence[Minibatch]) -> None:
        """What the models say at the start of the update: proximal and reference logprobs, and values, where needed."""
        spec, packs = self.algorithm, [pack for _, minibatch in steps for pack in minibatch]
        # A single step's own forward pass is made by the proximal policy: no extra pass is needed.
        several = len(steps) * self._learner.ppo_epochs > 1
        asked = "m2po" in spec.masks or spec.normalize_weights or spec.kl_in == "reward" or spec.learns_preferences
        asked |= self.critic is not None and self.critic.shared is not None
        update.recomputed = (several and needs_proximal(spec)) or asked
        if spec.needs_reference:
            update.reference_n = torch.full_like(update.proximal_n, math.nan)
        if self.actor is not None:
            self.actor.score(update, packs)
        if self.reference is not None and update.reference_n is not None:
            with update.timed("timing_s/ref"):
                self.reference.score(packs, update.reference_n)
        if self.critic is not None:
            self.critic.score(update, packs)
        if self.critic is not None and spec.bootstrap_truncated:
            self.critic.score_ends(update, self._learner.max_tokens_per_pack)
        with update.timed("timing_s/wait_ranks"):
            update.spread(self._ranks)
        if spec.normalize_weights:
            batch = update.batch
            update.weight_mean = mean_weight(spec, update.proximal_n, batch.behaviour_n, batch.sequence_n, batch.counts_s)

    def _estimate(self, update: Update) -> None:
        """Makes the batch's advantages, and returns for a critic. (A preference loss makes its own, step by step.)"""
        spec, outcomes = self.algorithm, update.batch.outcomes
        if spec.learns_preferences:
            return
        outcomes = outcomes._replace(rewards_s=self._normalizer(outcomes.rewards_s))
        if spec.kl_in == "reward":
            outcomes = outcomes._replace(token_rewards_n=outcomes.token_rewards_n + self._kl.penalty(update))
        update.rewards_s = outcomes.total_s()
        if self.critic is not None:
            outcomes = outcomes._replace(values_n=update.values_n.cpu().double())
        if spec.bootstrap_truncated:
            outcomes = outcomes._replace(ends_s=update.ends_s)
        advantages_n, returns_n = advantages(spec, outcomes)
        update.advantages_n = advantages_n.to(update.advantages_n)
        if returns_n is not None:
            update.returns_n = returns_n.to(update.returns_n)

    def _train(self, update: Update, steps: Sequence[Minibatch]) -> None:
        """The steps of an own critic, and of the policy; while the critic warms up, of the critic (or its head) alone."""
        alone = self.critic is not None and self.critic.alone(update)
        if self.critic is not None and (alone or self.critic.shared is None):
            self.critic.train(update, steps)
        if self.actor is not None and not alone:
            self.actor.train(update, steps)


def _local_bytes(weight: torch.Tensor) -> int:
    """Of the part that this rank has."""
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    return own.numel() * own.element_size()
