"""Versions and staleness, defined once. Pure: no I/O, no clock, no Ray; the store, tests and simulator all run this.

Words (docs/staleness.md): `committed` (c) is the number of updates the learner has committed; `update` (u) the update count of
some weights; `max_lag` (η) the bound in versions; a *position* counts outstanding groups from the oldest, from 0.
"""

from typing import Literal

import numpy as np
from msgspec import Struct

from asyncrl.errors import ConfigError

OnStale = Literal["mask", "wait", "drop"]
SelectorName = Literal["oldest", "freshest", "uniform"]


class Staleness(Struct, frozen=True, kw_only=True):
    """The hard bound and what happens when a slow group would pass it."""

    max_lag: int  # η, in versions; 0 is synchronous on-policy
    batch_groups: int  # B: groups per update
    on_stale: OnStale = "mask"  # η = 0 always waits, whatever it says
    selector: SelectorName = "oldest"  # which ready groups are trained first
    capacity_groups: int | None = None  # outstanding groups at the most, whatever the bound admits; None: the bound alone

    def __post_init__(self) -> None:
        if self.max_lag < 0:
            raise ConfigError(f"staleness.max_lag={self.max_lag} < 0: no token could ever be trained; use 0 for synchronous RL")
        if self.batch_groups < 1:
            raise ConfigError(f"batch_groups={self.batch_groups} < 1: an update needs at least one group")
        batch, capacity = self.batch_groups, self.capacity_groups
        if capacity is not None and batch > capacity:
            raise ConfigError(
                f"learner.batch_groups={batch} > staleness.capacity_groups={capacity}: a batch could never be admitted and the "
                "learner would wait for ever; raise staleness.capacity_groups or lower learner.batch_groups"
            )
        if self.waits and self.selector != "oldest":
            why = "max_lag=0 always waits" if self.max_lag == 0 else "on_stale='wait'"
            raise ConfigError(
                f"staleness.selector={self.selector!r} with {why}: the bound rests on training oldest first; "
                "use selector='oldest', or on_stale='mask' with max_lag >= 1"
            )

    @property
    def waits(self) -> bool:
        """Whether the learner trains strictly oldest first and waits for stragglers."""
        return self.on_stale == "wait" or self.max_lag == 0

    @property
    def drops(self) -> bool:
        return self.on_stale == "drop" and not self.waits

    def room(self, *, outstanding: int, committed: int, update: int) -> int:
        """How many more groups a caller whose weights stand at `update` may reserve; may be negative.

        `reserve(k)` is admitted iff k <= room: the newest of them then sits at position outstanding + k - 1 and,
        consumed oldest first in full batches, trains as update `committed + position // B + 1`, at a lag of at most η.
        """
        room = (self.max_lag + 1 - (committed - update)) * self.batch_groups - outstanding
        return room if self.capacity_groups is None else min(room, self.capacity_groups - outstanding)

    def reissuable(self, *, position: int, committed: int, update: int) -> bool:
        """Whether a lost group, keeping its position, may be generated again from weights at `update`."""
        return committed + position // self.batch_groups - update <= self.max_lag

    def overdue(self, *, oldest: int, committed: int) -> bool:
        """Whether a token from update `oldest` is already too old for the next update."""
        return lag(committed=committed, update=oldest) > self.max_lag

    def trainable(self, updates: np.ndarray, committed: int) -> np.ndarray:
        """Mask [T] bool of the tokens that update `committed + 1` may train: 0 <= lag <= η."""
        lag = committed - updates
        return (lag >= 0) & (lag <= self.max_lag)


def lag(*, committed: int, update: int) -> int:
    """Age in versions of a token from `update`, for a learner about to make update `committed + 1`."""
    return committed - update
