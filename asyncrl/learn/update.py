"""One update in progress: its batch, and the columns that fill while it is trained."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from asyncrl.learn.batch import Batch
from asyncrl.learn.objective import TokenWeights
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
