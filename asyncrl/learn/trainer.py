"""One update of the policy from one batch of scored rollouts. No store, no bus, no clock but for its own timings.

    rollouts ─► make_batch ─► packs ─► proximal (and reference) logprobs, once per batch
                                 └──► per minibatch and epoch: forward, objective, backward over its packs ─► AdamW step

Deterministic: the same model, rollouts and count give the same bits, on the same number of threads.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from asyncrl.algorithm import AlgorithmSpec
from asyncrl.config import LearnerSpec
from asyncrl.errors import ConfigError
from asyncrl.learn import objective as objectives
from asyncrl.learn.aggregate import aggregation
from asyncrl.learn.batch import Batch, make_batch, minibatches
from asyncrl.learn.batch_metrics import correction_metrics, gap_metrics, rollout_metrics, staleness_metrics
from asyncrl.learn.estimators import estimator
from asyncrl.learn.kl import KL_ESTIMATORS, adapted
from asyncrl.learn.masks import m2po
from asyncrl.learn.optimizer import guarded_step, make_optimizer, make_packs, set_rate
from asyncrl.learn.refused import RefusedSteps
from asyncrl.learn.schedule import learning_rate
from asyncrl.models.logprobs import entropy, sampled_logprobs
from asyncrl.models.packed import Pack, PackedModel
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout


class PolicyTrainer:
    """Owns the policy, its optimizer and, with kl_coef > 0, a frozen reference (the starting policy, its own copy).

    temperature: of the sampling; logprobs are taken at it. total_steps: updates over which the schedule runs.
    refused_dir: where batches of refused steps are kept. state: figures that go from update to update and belong into a
    checkpoint: the KL coefficient, where it adapts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        learner: LearnerSpec,
        algorithm: AlgorithmSpec,
        bound: Staleness,
        *,
        temperature: float,
        total_steps: int,
        refused_dir: Path,
        reference: PreTrainedModel | None = None,
    ) -> None:
        if algorithm.kl_coef and reference is None:
            raise ConfigError(f"algorithm.kl_coef={algorithm.kl_coef} needs a reference model; load one, or set kl_coef to 0")
        self.model = model.eval()  # dropout would make the learner another policy than the generators'
        self.optimizer = make_optimizer(model, learner)
        self._policy = PackedModel(model)
        self._reference = PackedModel(reference.eval()) if algorithm.kl_coef and reference is not None else None
        self._learner = learner
        self._algorithm = algorithm
        self._bound = bound
        self.state = {"kl_coef": algorithm.kl_coef} if algorithm.kl_control == "adaptive" else {}
        self._temperature = temperature
        self._total_steps = total_steps
        self._refused = RefusedSteps(refused_dir, learner.max_refused_steps)

    def update(self, rollouts: Sequence[TrainRollout], committed: int) -> dict[str, float]:
        """Makes update `committed + 1` and returns its metrics; with nothing to train the weights stay as they are.

        Raises NonFinite after max_refused_steps refused optimizer steps in a row.
        """
        rate = learning_rate(self._learner, committed, self._total_steps)
        set_rate(self.optimizer, rate)
        started = time.perf_counter()
        spec = self._algorithm
        batch = make_batch(rollouts, self._bound, committed, estimator(spec.adv_estimator))
        run = _Run(batch.to(self.model.device), committed + 1)
        steps = [
            (members, make_packs(batch.sequences, members, self._learner.max_tokens_per_pack, self.model.device))
            for members in minibatches(batch.groups, self._learner.mini_batch_groups)
        ]
        # A single step's own forward pass is made by the proximal policy: no extra pass is needed.
        several = len(steps) * self._learner.ppo_epochs > 1
        run.recomputed = (several and objectives.needs_proximal(spec)) or "m2po" in spec.masks or spec.kl_in == "reward"
        with _timed(run.timings, "timing_s/old_log_prob"):
            packs = [pack for _, minibatch in steps for pack in minibatch]
            if run.recomputed:
                self._score(self._policy, packs, run.proximal_n)
            if self._reference is not None:
                run.reference_n = self._score(self._reference, packs, torch.empty_like(run.proximal_n))
        if spec.kl_in == "reward":
            self._charge_kl(run)
        for _ in range(self._learner.ppo_epochs):
            for members, minibatch in steps:
                self._step(run, members, minibatch)
        run.timings["timing_s/update"] = time.perf_counter() - started
        return {
            **rollout_metrics(rollouts),
            **staleness_metrics(rollouts, batch),
            **gap_metrics(batch, run.proximal_n.cpu()),
            **correction_metrics(batch.lag_n, run.weights_n.cpu(), run.capped_n.cpu(), run.masked_n.cpu()),
            **objectives.metrics(run.sums, run.accepted),
            **self._control_kl(run, len(rollouts)),
            "actor/lr": rate,
            "actor/optimizer_steps": float(run.accepted),
            "actor/refused_steps": float(run.refused),
            **run.timings,
        }

    @torch.no_grad()
    def _score(self, scorer: PackedModel, packs: Sequence[Pack], out_n: torch.Tensor) -> torch.Tensor:
        """Fills out_n [N] with logprobs of the packs' tokens."""
        for pack in packs:
            out_n[pack.flat_t] = sampled_logprobs(scorer.logits(pack), pack.target_ids_t, self._temperature)
        return out_n

    def _step(self, run: "_Run", members: Sequence[int], packs: Sequence[Pack]) -> None:
        """One optimizer step over a minibatch, or none if anything in it is not finite."""
        cause = ""
        if not all(run.batch.behaviour_n[pack.flat_t].isfinite().all() for pack in packs):
            cause = "a behaviour logprob is not finite"
        else:
            with _timed(run.timings, "timing_s/forward_backward"):
                sums = self._backward(run, members, packs)
            with _timed(run.timings, "timing_s/optimizer"):
                norm, cause = guarded_step(self.model, self.optimizer, self._learner.max_grad_norm, sums["loss"])
        self.optimizer.zero_grad()
        if cause:
            run.refused += 1
            self._refused.refuse(run.batch, members, run.number, cause)
            return
        self._refused.accepted()
        run.accepted += 1
        for name, value in {**sums, "grad_norm": norm}.items():
            run.sums[name] += value

    def _backward(self, run: "_Run", members: Sequence[int], packs: Sequence[Pack]) -> dict[str, float]:
        """Accumulates the minibatch's gradient pack by pack; returns sums over its tokens, the loss among them."""
        spec, batch = self._algorithm, run.batch
        coefficient_s = torch.zeros_like(batch.counts_s)
        coefficient_s[members] = aggregation(spec)(batch.counts_s[members])
        kept_n = self._keep(run, packs, spec.m2po_bound) if "m2po" in spec.masks else None
        totals: dict[str, torch.Tensor] = {}
        for pack in packs:
            logits_tv = self._policy.logits(pack)
            logp_t = sampled_logprobs(logits_tv, pack.target_ids_t, self._temperature)
            with nullcontext() if spec.entropy_coef else torch.no_grad():
                entropy_t = entropy(logits_tv, self._temperature)
            if not run.recomputed and not run.tried:
                run.proximal_n[pack.flat_t] = logp_t.detach()
            columns = objectives.Columns(
                coefficients_t=coefficient_s[batch.sequence_n[pack.flat_t]],
                advantages_t=batch.advantages_n[pack.flat_t],
                behaviour_t=batch.behaviour_n[pack.flat_t],
                proximal_t=run.proximal_n[pack.flat_t],
                sequence_t=batch.sequence_n[pack.flat_t],
                lag_t=batch.lag_n[pack.flat_t],
                reference_t=None if run.reference_n is None or spec.kl_in == "reward" else run.reference_n[pack.flat_t],
                kept_t=None if kept_n is None else kept_n[pack.flat_t],
            )
            loss, sums, counted = objectives.objective(spec, columns, logp_t, entropy_t, self.state.get("kl_coef"))
            loss.backward()
            run.remember(pack, counted)
            for name, value in {**sums, "loss": loss.detach()}.items():
                totals[name] = totals.get(name, 0.0) + value.double()
        return {name: value.item() for name, value in totals.items()}

    @staticmethod
    def _keep(run: "_Run", packs: Sequence[Pack], bound: float) -> torch.Tensor:
        """What m2po leaves of a minibatch [N] bool; False outside of it."""
        flat_m = torch.cat([pack.flat_t for pack in packs])
        kept_n = torch.zeros_like(run.masked_n)
        kept_n[flat_m] = m2po(run.proximal_n[flat_m] - run.batch.behaviour_n[flat_m], bound)
        return kept_n

    def _kl(self, run: "_Run") -> torch.Tensor:
        """KL per token [N] of the proximal policy to the reference, by the recipe's estimator; NaN where not known."""
        assert run.reference_n is not None, "asked for a KL without a reference"
        return KL_ESTIMATORS[self._algorithm.kl_estimator](run.proximal_n, run.reference_n)

    def _charge_kl(self, run: "_Run") -> None:
        """Takes β·KL off what each trained token earned, and makes the advantages anew (Ziegler et al. 2019; verl)."""
        coef = self.state.get("kl_coef", self._algorithm.kl_coef)
        outcomes = run.batch.outcomes._replace(shaping_n=-coef * self._kl(run).cpu().double())
        advantages_n = estimator(self._algorithm.adv_estimator)(outcomes).float()
        run.batch = run.batch._replace(advantages_n=advantages_n.to(self.model.device))

    def _control_kl(self, run: "_Run", rollouts: int) -> dict[str, float]:
        """Moves the coefficient, where it adapts, by this batch's KL; figures of both, under verl's names."""
        if run.reference_n is None:
            return {}
        spec, figures = self._algorithm, {}
        coef = self.state.get("kl_coef", spec.kl_coef)
        kl_n = self._kl(run)
        kl = float(kl_n[kl_n.isfinite()].mean()) if kl_n.isfinite().any() else None
        if spec.kl_in == "reward" and kl is not None:
            figures["actor/reward_kl_penalty"] = kl
        if self.state and kl is not None:
            self.state["kl_coef"] = adapted(coef, kl, target=spec.kl_target, horizon=spec.kl_horizon, rollouts=rollouts)
        return {**figures, "actor/reward_kl_penalty_coeff" if spec.kl_in == "reward" else "actor/kl_coef": coef}


class _Run:
    """One update in progress. proximal_n [N]: NaN until computed; recomputed: by a pass of its own, before the first step.

    weights_n, capped_n, masked_n [N]: the correction of each token, when it was last trained; weights NaN before.
    """

    def __init__(self, batch: Batch, number: int) -> None:
        self.batch = batch
        self.number = number
        self.recomputed = False
        self.proximal_n = torch.full_like(batch.behaviour_n, math.nan)
        self.reference_n: torch.Tensor | None = None
        self.weights_n = torch.full_like(batch.behaviour_n, math.nan)
        self.capped_n = torch.zeros_like(batch.behaviour_n, dtype=torch.bool)
        self.masked_n = torch.zeros_like(batch.behaviour_n, dtype=torch.bool)
        self.sums: dict[str, float] = defaultdict(float)
        self.timings: dict[str, float] = defaultdict(float)
        self.accepted = 0
        self.refused = 0

    @property
    def tried(self) -> int:
        """Optimizer steps so far, refused ones among them."""
        return self.accepted + self.refused

    def remember(self, pack: Pack, counted: objectives.TokenWeights) -> None:
        self.weights_n[pack.flat_t] = counted.weights_t
        self.capped_n[pack.flat_t] = counted.capped_t
        self.masked_n[pack.flat_t] = counted.masked_t


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[name] += time.perf_counter() - started
