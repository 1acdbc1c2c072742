"""One update of the policy from one batch of scored rollouts. No store, no bus, no clock but for its own timings.

    rollouts ─► make_batch ─► packs ─► proximal (and reference) logprobs, once per batch
                                 └──► per minibatch and epoch: forward, objective, backward over its packs ─► AdamW step

Deterministic: the same model, rollouts and count give the same bits, on the same number of threads.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
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
from asyncrl.learn.kl_control import KLControl
from asyncrl.learn.masks import m2po
from asyncrl.learn.packing import split_into_packs
from asyncrl.learn.refused import RefusedSteps
from asyncrl.learn.schedule import learning_rate
from asyncrl.learn.update import Update
from asyncrl.models.logprobs import entropy, sampled_logprobs
from asyncrl.models.packed import Pack, PackedModel, make_pack
from asyncrl.staleness import Staleness
from asyncrl.types import TrainRollout

log = logging.getLogger(__name__)
CPU_PACK_TOKENS = 2048  # beyond it a CPU only loses its caches (measured: 16,384 is a third slower)


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
        self._kl = KLControl(algorithm)
        self.state = self._kl.state
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
        spec = self._algorithm
        batch = make_batch(rollouts, self._bound, committed, estimator(spec.adv_estimator))
        update = Update(batch.to(self.model.device), committed + 1)
        steps = [
            (members, self._packs(batch, members)) for members in minibatches(batch.groups, self._learner.mini_batch_groups)
        ]
        # A single step's own forward pass is made by the proximal policy: no extra pass is needed.
        several = len(steps) * self._learner.ppo_epochs > 1
        update.recomputed = (several and objectives.needs_proximal(spec)) or "m2po" in spec.masks or spec.kl_in == "reward"
        with update.timed("timing_s/old_log_prob"):
            packs = [pack for _, minibatch in steps for pack in minibatch]
            if update.recomputed:
                self._score(self._policy, packs, update.proximal_n)
            if self._reference is not None:
                update.reference_n = self._score(self._reference, packs, torch.empty_like(update.proximal_n))
        self._remake_advantages(update)
        for _ in range(self._learner.ppo_epochs):
            for members, minibatch in steps:
                self._step(update, members, minibatch)
        update.timings["timing_s/update"] = time.perf_counter() - started
        return {
            **rollout_metrics(rollouts),
            **staleness_metrics(rollouts, batch),
            **gap_metrics(batch, update.proximal_n.cpu()),
            **correction_metrics(batch.lag_n, update.weights_n.cpu(), update.capped_n.cpu(), update.masked_n.cpu()),
            **objectives.metrics(update.sums, update.accepted),
            **self._kl.control(update, len(rollouts)),
            "actor/lr": rate,
            "actor/optimizer_steps": float(update.accepted),
            "actor/refused_steps": float(update.refused),
            **update.timings,
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

    def _remake_advantages(self, update: Update) -> None:
        """Makes the advantages anew, of what is known only after scoring: the price of the KL."""
        spec = self._algorithm
        if spec.kl_in == "reward":
            outcomes = update.batch.outcomes.with_shaping(self._kl.price(update))
            update.set_advantages(estimator(spec.adv_estimator)(outcomes))

    def _step(self, update: Update, members: Sequence[int], packs: Sequence[Pack]) -> None:
        """One optimizer step over a minibatch, or none if anything in it is not finite."""
        cause = ""
        if not all(update.batch.behaviour_n[pack.flat_t].isfinite().all() for pack in packs):
            cause = "a behaviour logprob is not finite"
        else:
            with update.timed("timing_s/forward_backward"):
                sums = self._backward(update, members, packs)
            with update.timed("timing_s/optimizer"):
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._learner.max_grad_norm or math.inf).item()
                if not math.isfinite(sums["loss"]):
                    cause = f"the loss is {sums['loss']}"
                elif not math.isfinite(norm):
                    cause = f"the gradient norm is {norm}"
                else:
                    self.optimizer.step()
        self.optimizer.zero_grad()
        if cause:
            update.refused += 1
            self._refused.refuse(update.batch, members, update.number, cause)
            return
        self._refused.accepted()
        update.accepted += 1
        for name, value in {**sums, "grad_norm": norm}.items():
            update.sums[name] += value

    def _backward(self, update: Update, members: Sequence[int], packs: Sequence[Pack]) -> dict[str, float]:
        """Accumulates the minibatch's gradient pack by pack; returns sums over its tokens, the loss among them."""
        spec, batch = self._algorithm, update.batch
        coefficient_s = self._coefficients(update, members)
        kept_n = self._keep(update, packs, spec.m2po_bound) if "m2po" in spec.masks else None
        totals: dict[str, torch.Tensor] = {}
        for pack in packs:
            logits_tv = self._policy.logits(pack)
            logp_t = sampled_logprobs(logits_tv, pack.target_ids_t, self._temperature)
            with nullcontext() if spec.entropy_coef else torch.no_grad():
                entropy_t = entropy(logits_tv, self._temperature)
            if not update.recomputed and not update.tried:
                update.proximal_n[pack.flat_t] = logp_t.detach()
            columns = objectives.Columns(
                coefficients_t=coefficient_s[batch.sequence_n[pack.flat_t]],
                advantages_t=batch.advantages_n[pack.flat_t],
                behaviour_t=batch.behaviour_n[pack.flat_t],
                proximal_t=update.proximal_n[pack.flat_t],
                sequence_t=batch.sequence_n[pack.flat_t],
                lag_t=batch.lag_n[pack.flat_t],
                reference_t=None if update.reference_n is None or spec.kl_in == "reward" else update.reference_n[pack.flat_t],
                kept_t=None if kept_n is None else kept_n[pack.flat_t],
            )
            loss, sums, counted = objectives.objective(spec, columns, logp_t, entropy_t, self._kl.coef)
            loss.backward()
            update.remember(pack, counted)
            for name, value in {**sums, "loss": loss.detach()}.items():
                totals[name] = totals.get(name, 0.0) + value.double()
        return {name: value.item() for name, value in totals.items()}

    def _coefficients(self, update: Update, members: Sequence[int]) -> torch.Tensor:
        """What a token of each sequence weighs in this minibatch's loss [S]; 0 for sequences of other minibatches."""
        coefficient_s = torch.zeros_like(update.batch.counts_s)
        coefficient_s[members] = aggregation(self._algorithm)(update.batch.counts_s[members])
        return coefficient_s

    @staticmethod
    def _keep(update: Update, packs: Sequence[Pack], bound: float) -> torch.Tensor:
        """What m2po leaves of a minibatch [N] bool; False outside of it."""
        flat_m = torch.cat([pack.flat_t for pack in packs])
        kept_n = torch.zeros_like(update.masked_n)
        kept_n[flat_m] = m2po(update.proximal_n[flat_m] - update.batch.behaviour_n[flat_m], bound)
        return kept_n
