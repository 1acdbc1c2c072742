"""One update in progress: its batch, and the columns that fill while it is trained."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from asyncrl.algorithms.objective import TokenWeights
from asyncrl.errors import NonFinite
from asyncrl.learn.batch import Batch
from asyncrl.models.packed import Pack


class Steps:
    """Optimizer steps of one model in an update: accepted, refused, and sums over the tokens of the accepted ones."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
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
    """proximal_n [N]: NaN until computed; recomputed: by a pass of its own, before the first step. reference_n [N] or None.

    weights_n, capped_n, masked_n [N]: the correction of each token, when it was last trained; weights NaN before.
    values_n [N]: the critic's at the start of the update, returns_n [N]: what it learns; NaN until known, or for ever.
    actor, critic: their steps. timings: seconds by metric name. number: of the update, from 1.
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
        self.values_n = torch.full_like(batch.behaviour_n, math.nan)
        self.returns_n = torch.full_like(batch.behaviour_n, math.nan)
        self.actor = Steps()
        self.critic = Steps()
        self.timings: dict[str, float] = defaultdict(float)

    def set_advantages(self, advantages_n: torch.Tensor) -> None:
        """Replaces the batch's advantages [N] by ones that were made later, on any device."""
        self.batch = self.batch._replace(advantages_n=advantages_n.to(self.batch.advantages_n))

    def remember(self, pack: Pack, counted: TokenWeights) -> None:
        self.weights_n[pack.flat_t] = counted.weights_t
        self.capped_n[pack.flat_t] = counted.capped_t
        self.masked_n[pack.flat_t] = counted.masked_t

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the block's time to a metric."""
        started = time.perf_counter()
        yield
        self.timings[name] += time.perf_counter() - started


# ------------------------------------------------------------------------------------------- refused
# Non-finite guard: keeps the batch of a refused step for inspection, and stops the run after too many in a row.


class RefusedSteps:
    """Counts refused optimizer steps in a row. folder: where their batches go, one .npz each (no pickle inside)."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._in_a_row = 0

    def accepted(self) -> None:
        self._in_a_row = 0

    def refuse(self, batch: Batch, members: Sequence[int], update: int, cause: str) -> None:
        """Saves the minibatch of a refused step. Raises NonFinite when it is the `limit`-th in a row."""
        self._in_a_row += 1
        path = self._folder / f"update_{update:06d}_refused_{self._in_a_row}.npz"
        _save(path, batch, members, cause)
        if self._in_a_row >= self._limit:
            raise NonFinite(
                f"{cause} in update {update}: {self._in_a_row} optimizer steps refused in a row "
                f"(learner.max_refused_steps={self._limit}), weights are as before them; the batch is in {path}. "
                "Look for a model that diverged (lower its lr), or logprobs that the engine did not report"
            )


def _save(path: Path, batch: Batch, members: Sequence[int], cause: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
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
        advantages=batch.advantages_n.cpu().numpy()[tokens],
        lags=batch.lag_n.cpu().numpy()[tokens],
    )
