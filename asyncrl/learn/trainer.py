"""One update of the policy from one batch of scored rollouts. No store, no bus, no clock but for its own timings.

    rollouts ─► make_batch ─► packs ─► proximal (and reference) logprobs, once per batch
                                 └──► per minibatch and epoch: forward, objective, backward over its packs ─► AdamW step

Deterministic: the same model, rollouts and count give the same bits, on the same number of threads.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from asyncrl.config import AlgorithmSpec, LearnerSpec
from asyncrl.errors import ConfigError
from asyncrl.learn import objective as objectives
from asyncrl.learn.advantages import ESTIMATORS
from asyncrl.learn.aggregate import AGGREGATIONS
from asyncrl.learn.batch import Batch, make_batch, minibatches
from asyncrl.learn.batch_metrics import gap_metrics, rollout_metrics, staleness_metrics
from asyncrl.learn.packing import split_into_packs
from asyncrl.learn.refused import RefusedSteps
from asyncrl.learn.schedule import learning_rate
from asyncrl.models.logprobs import entropy, sampled_logprobs
from asyncrl.models.packed import Pack, PackedModel, make_pack
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout

log = logging.getLogger(__name__)
CPU_PACK_TOKENS = 2048  # beyond it a CPU only loses its caches (measured: 16,384 is a third slower)


class PolicyTrainer:
    """Owns the policy, its optimizer and, with kl_coef > 0, a frozen reference (the starting policy, its own copy).

    temperature: of the sampling; logprobs are taken at it. total_steps: updates over which the schedule runs.
    refused_dir: where batches of refused steps are kept.
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
        if model.dtype != torch.float32:
            log.warning(
                "model.dtype=%s rounds away every optimizer step below 1/512 of a weight: learner.lr=%g may train nothing; "
                "use model.dtype=float32",
                str(model.dtype).removeprefix("torch."),
                learner.lr,
            )
        self.model = model.eval()  # dropout would make the learner another policy than the generators'
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=learner.lr,
            betas=learner.betas,
            eps=learner.eps,
            weight_decay=learner.weight_decay,
            fused=True,
        )
        self._policy = PackedModel(model)
        self._reference = PackedModel(reference.eval()) if algorithm.kl_coef and reference is not None else None
        self._learner = learner
        self._algorithm = algorithm
        self._bound = bound
        self._temperature = temperature
        self._total_steps = total_steps
        self._refused = RefusedSteps(refused_dir, learner.max_refused_steps)

    def update(self, rollouts: Sequence[TrainRollout], committed: int) -> dict[str, float]:
        """Makes update `committed + 1` and returns its metrics; with nothing to train the weights stay as they are.

        Raises NonFinite after max_refused_steps refused optimizer steps in a row.
        """
        rate = learning_rate(self._learner, committed, self._total_steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        started = time.perf_counter()
        batch = make_batch(rollouts, self._bound, committed, ESTIMATORS[self._algorithm.adv_estimator])
        run = _Run(batch.to(self.model.device), committed + 1)
        steps = [
            (members, self._packs(batch, members)) for members in minibatches(batch.groups, self._learner.mini_batch_groups)
        ]
        # A single step's own forward pass is made by the proximal policy: no extra pass is needed.
        run.recomputed = len(steps) * self._learner.ppo_epochs > 1
        with _timed(run.timings, "timing_s/old_log_prob"):
            packs = [pack for _, minibatch in steps for pack in minibatch]
            if run.recomputed:
                self._score(self._policy, packs, run.proximal_n)
            if self._reference is not None:
                run.reference_n = self._score(self._reference, packs, torch.empty_like(run.proximal_n))
        for _ in range(self._learner.ppo_epochs):
            for members, minibatch in steps:
                self._step(run, members, minibatch)
        run.timings["timing_s/update"] = time.perf_counter() - started
        return {
            **rollout_metrics(rollouts),
            **staleness_metrics(rollouts, batch),
            **gap_metrics(batch, run.proximal_n.cpu()),
            **objectives.metrics(run.sums, run.accepted),
            "actor/lr": rate,
            "actor/optimizer_steps": float(run.accepted),
            "actor/refused_steps": float(run.refused),
            **run.timings,
        }

    def _packs(self, batch: Batch, members: Sequence[int]) -> list[Pack]:
        bound = self._learner.max_tokens_per_pack
        if self.model.device.type == "cpu":
            bound = min(bound, CPU_PACK_TOKENS)
        return [
            make_pack(batch.sequences, pack, self.model.device) for pack in split_into_packs(batch.sequences, members, bound)
        ]

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
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._learner.max_grad_norm or math.inf).item()
                if not math.isfinite(sums["loss"]):
                    cause = f"the loss is {sums['loss']}"
                elif not math.isfinite(norm):
                    cause = f"the gradient norm is {norm}"
                else:
                    self.optimizer.step()
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
        coefficient_s[members] = AGGREGATIONS[spec.loss_agg](batch.counts_s[members])
        totals: dict[str, torch.Tensor] = {}
        for pack in packs:
            logits_tv = self._policy.logits(pack)
            logp_t = sampled_logprobs(logits_tv, pack.target_ids_t, self._temperature)
            with nullcontext() if spec.entropy_coef else torch.no_grad():
                entropy_t = entropy(logits_tv, self._temperature)
            if not run.recomputed:
                run.proximal_n[pack.flat_t] = logp_t.detach()
            columns = objectives.Columns(
                coefficients_t=coefficient_s[batch.sequence_n[pack.flat_t]],
                advantages_t=batch.advantages_n[pack.flat_t],
                behaviour_t=batch.behaviour_n[pack.flat_t],
                proximal_t=run.proximal_n[pack.flat_t],
                reference_t=None if run.reference_n is None else run.reference_n[pack.flat_t],
            )
            loss, sums = objectives.objective(spec, columns, logp_t, entropy_t)
            loss.backward()
            for name, value in {**sums, "loss": loss.detach()}.items():
                totals[name] = totals.get(name, 0.0) + value.double()
        return {name: value.item() for name, value in totals.items()}


class _Run:
    """One update in progress. proximal_n [N]: NaN until computed; recomputed: by a pass of its own, before the first step."""

    def __init__(self, batch: Batch, number: int) -> None:
        self.batch = batch
        self.number = number
        self.recomputed = False
        self.proximal_n = torch.full_like(batch.behaviour_n, math.nan)
        self.reference_n: torch.Tensor | None = None
        self.sums: dict[str, float] = defaultdict(float)
        self.timings: dict[str, float] = defaultdict(float)
        self.accepted = 0
        self.refused = 0


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[name] += time.perf_counter() - started
