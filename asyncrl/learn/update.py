"""One update in progress: its batch, the columns that fill while it is trained, its steps, and what becomes of refused ones."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from asyncrl.algorithms.objective import TokenWeights
from asyncrl.config import Group
from asyncrl.errors import NonFinite
from asyncrl.learn.batch import TrainBatch
from asyncrl.models.packed import Pack
from asyncrl.models.ranks import Ranks

Minibatch = tuple[Sequence[int], Sequence[Pack]]  # members (indices of the batch's sequences), this share's packs of them


class Sums:
    """Sums by name, float64, over the tokens of one step: of this share's packs, then of all shares' as well."""

    def __init__(self) -> None:
        self._by_name: dict[str, torch.Tensor] = {}

    def add(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Adds those of a pack, which have the same names for every pack of every share."""
        for name, value in sums.items():
            self._by_name[name] = self._by_name.get(name, 0.0) + value.double()

    def over(self, ranks: Ranks) -> dict[str, float]:
        """The same on every rank; all must call it."""
        return dict(zip(self._by_name, ranks.sum_(torch.stack([*self._by_name.values()])).tolist(), strict=True))


class Steps:
    """Optimizer steps of one model in an update."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)  # over the tokens of the accepted ones
        self.accepted = 0
        self.refused = 0

    @property
    def tried(self) -> int:
        return self.accepted + self.refused

    def accept(self, sums: Mapping[str, float]) -> None:
        self.accepted += 1
        for name, value in sums.items():
            self.sums[name] += value


class Update:
    """The columns [N] of an update are float32 and NaN until they are known, if they ever are."""

    def __init__(self, batch: TrainBatch, number: int) -> None:
        def unknown() -> torch.Tensor:
            return torch.full_like(batch.behaviour_n, math.nan)

        self.batch = batch
        self.number = number  # from 1
        self.recomputed = False  # whether proximal_n came from a pass of its own, before the first step
        self.proximal_n = unknown()  # logprobs at the start of the update
        self.reference_n: torch.Tensor | None = None  # logprobs of the reference, where there is one
        self.values_n = unknown()  # the critic's at the start of the update
        self.ends_s = torch.zeros_like(batch.outcomes.rewards_s)  # those after the last token of rollouts that were cut
        self.returns_n = unknown()  # what the critic learns
        self.weight_mean = 1.0  # of the batch's correction weights, where these are divided by it
        self.advantages_n = unknown()  # made once, after scoring; of preferences, for every minibatch
        no = torch.zeros_like(batch.behaviour_n, dtype=torch.bool)
        self.counted = TokenWeights(unknown(), no, no.clone(), unknown())  # how each token counted when it was last trained
        self.rewards_s: torch.Tensor | None = None  # of rollouts, as the estimator saw them
        self.actor = Steps()
        self.critic = Steps()
        self.timings: dict[str, float] = defaultdict(float)  # seconds by metric name, one after the other
        self.beside: dict[str, float] = {}  # the same of models that only other ranks hold, meanwhile

    def remember(self, pack: Pack, counted: TokenWeights) -> None:
        for column_n, column_t in zip(self.counted, counted, strict=True):
            column_n[pack.flat_t] = column_t

    def spread(self, ranks: Ranks) -> None:
        """Fills what models have scored that other ranks hold. All ranks must call it, those of all groups."""
        ranks.spread_(self.proximal_n, "learner")
        ranks.spread_(self.values_n, "critic")
        ranks.spread_(self.ends_s, "critic")
        if self.reference_n is not None:
            ranks.spread_(self.reference_n, "reference")

    def merge(self, ranks: Ranks) -> None:
        """Fills what the steps have made with what those of other shares, and of other models, made. All ranks must call it."""
        if not self.recomputed:
            ranks.merge_(self.proximal_n)
            ranks.spread_(self.proximal_n, "learner")
        weights_n, capped_n, masked_n, ratio_n = self.counted
        capped_n, masked_n = (ranks.sum_(flag_n.byte()).bool() for flag_n in (capped_n, masked_n))
        self.counted = TokenWeights(ranks.merge_(weights_n), capped_n, masked_n, ranks.merge_(ratio_n))
        models: tuple[tuple[Group, Steps], ...] = (("learner", self.actor), ("critic", self.critic))
        for model, steps in models:
            told = json.loads(ranks.spread_text(json.dumps((steps.sums, steps.accepted, steps.refused, self.timings)), model))
            steps.sums, steps.accepted, steps.refused, timings = told
            self.beside |= {name: seconds for name, seconds in timings.items() if name not in self.timings}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the block's time to a metric."""
        started = time.perf_counter()
        yield
        self.timings[name] += time.perf_counter() - started


class RefusedSteps:
    """The guard against non-finite steps: keeps the batches of refused ones, and stops the run after `limit` in a row.

    Every rank has one, and all are told the same; one of them `keeps` the batches.
    """

    def __init__(self, folder: Path, limit: int, keeps: bool = True) -> None:
        self._folder = folder  # where batches go, one .npz each, without pickle
        self._limit = limit
        self._keeps = keeps
        self._in_a_row = 0

    def settle(
        self, update: Update, members: Sequence[int], cause: str, sums: Mapping[str, float], norms: Mapping[Steps, float]
    ) -> None:
        """Counts a step over a minibatch: as refused where there is a cause, else as accepted, with its sums.

        norms: of the gradients of those who made it together. A refused one's minibatch is saved. Raises NonFinite when it
        is the `limit`-th in a row.
        """
        if not cause:
            self._in_a_row = 0
            for steps, norm in norms.items():
                steps.accept({**sums, "grad_norm": norm})
            return
        self._in_a_row += 1
        for steps in norms:
            steps.refused += 1
        path = self._folder / f"update_{update.number:06d}_refused_{self._in_a_row}.npz"
        if self._keeps:
            _save(path, update, members, cause)
        if self._in_a_row >= self._limit:
            raise NonFinite(
                f"{cause} in update {update.number}: {self._in_a_row} optimizer steps refused in a row "
                f"(learner.max_refused_steps={self._limit}), weights are as before them; the batch is in {path}. "
                "Look for a model that diverged (lower its lr), or logprobs that the engine did not report"
            )


def _save(path: Path, update: Update, members: Sequence[int], cause: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = update.batch
    chosen = [batch.sequences[i] for i in members]
    tokens = np.isin(batch.sequence_n.cpu().numpy(), members)
    np.savez(
        path,
        cause=np.array(cause),
        groups=batch.groups[list(members)],
        ids=np.concatenate([s.ids for s in chosen]),
        id_counts=np.array([len(s.ids) for s in chosen]),
        scored=np.concatenate([s.scored for s in chosen]),
        scored_counts=np.array([len(s.scored) for s in chosen]),
        behaviour=batch.behaviour_n.cpu().numpy()[tokens],
        advantages=update.advantages_n.cpu().numpy()[tokens],
        lags=batch.lag_n.cpu().numpy()[tokens],
    )
