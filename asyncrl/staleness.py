"""Versions and staleness, defined once. Pure: no I/O, no clock, no Ray; the store, tests and simulator all run this.

Words (docs/staleness.md): `committed` (c) is the number of updates the learner has committed; `update` (u) the update count of
some weights; `max_lag` (η) the bound in versions; the *deadline* of a group is `oldest + η`, `oldest` being the update of its
oldest token: the largest c at which every token of it may still be trained.

The rule. I(c): the outstanding groups, trained earliest deadline first, B an update, all meet their deadlines. Admission
(`room`) and reissues keep I; a batch is granted only if I(c + 1) holds for all others. So the bound is kept by whom the learner
waits for, nothing is masked, and it waits only where a straggler would certainly be late. It cannot wait for ever: once every
group is ready, the batch of the earliest deadlines is one that may be granted.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import numpy as np
from msgspec import Struct

from asyncrl.errors import ConfigError

OnStale = Literal["hold", "mask", "wait", "drop"]
SelectorName = Literal["oldest", "freshest", "uniform"]


class Staleness(Struct, frozen=True, kw_only=True):
    """How old a trained token may be, how far generation runs ahead, and what happens where a slow group would be late."""

    max_lag: int  # η, in versions; 0 is synchronous on-policy
    batch_groups: int  # B: groups per update
    reserve_ahead: int | None = None  # batches outstanding at the most; None: as many as the bound admits, max_lag + 1
    on_stale: OnStale = "hold"  # η = 0 always holds, whatever it says
    max_masked_share: float = 0.0  # of the groups that ended, those that `hold` goes on without rather than wait
    selector: SelectorName = "oldest"  # which ready groups are trained first, where none is waited for

    def __post_init__(self) -> None:
        if self.max_lag < 0:
            raise ConfigError(f"staleness.max_lag={self.max_lag} < 0: no token could ever be trained; use 0 for synchronous RL")
        if self.batch_groups < 1:
            raise ConfigError(f"batch_groups={self.batch_groups} < 1: an update needs at least one group")
        ahead, most = self.reserve_ahead, self.max_lag + 1
        if ahead is not None and ahead < 1:
            raise ConfigError(
                f"staleness.reserve_ahead={ahead} < 1 batch: none could ever be admitted and the learner would wait for ever; "
                "use at least 1, or 'auto'"
            )
        if ahead is not None and ahead > most:
            raise ConfigError(
                f"staleness.reserve_ahead={ahead} > {most}: staleness.max_lag={self.max_lag} admits {most} batches at most, so "
                "it would be ignored; raise max_lag, or use reserve_ahead='auto'"
            )
        if ahead is not None and self.on_stale == "wait":
            raise ConfigError(
                f"staleness.reserve_ahead={ahead} with on_stale='wait', which reserves max_lag + 1 = {most} batches ahead; use "
                "on_stale='hold'"
            )
        if not 0 <= self.max_masked_share <= 1:
            raise ConfigError(
                f"staleness.max_masked_share={self.max_masked_share} is outside [0, 1]: it is a share of the groups"
            )
        if self.max_masked_share and self.on_stale != "hold":
            raise ConfigError(
                f"staleness.max_masked_share={self.max_masked_share} with on_stale={self.on_stale!r} would be ignored; use "
                "on_stale='hold'"
            )
        if self.holds and self.selector != "oldest":
            why = "max_lag=0 always holds" if self.max_lag == 0 else f"on_stale={self.on_stale!r}"
            raise ConfigError(
                f"staleness.selector={self.selector!r} with {why}: the bound rests on training what is oldest first; "
                "use selector='oldest', or on_stale='mask' with max_lag >= 1"
            )

    @property
    def holds(self) -> bool:
        """Whether the learner waits for a group that would otherwise pass the bound."""
        return self.on_stale in ("hold", "wait") or self.max_lag == 0

    @property
    def drops(self) -> bool:
        return self.on_stale == "drop" and not self.holds

    @property
    def most_outstanding(self) -> int:
        """Groups outstanding at the most: those in flight, ready and in training."""
        return (self.max_lag + 1 if self.reserve_ahead is None else self.reserve_ahead) * self.batch_groups

    def room(self, *, untaken: int, committed: int, update: int) -> int:
        """How many more groups the bound lets a caller reserve whose weights stand at `update`; may be negative.

        untaken: outstanding groups that are in no batch yet. committed: updates before any of them can be trained, those of
        leased batches included.
        """
        return (self.max_lag + 1 - (committed - update)) * self.batch_groups - untaken

    def deadline(self, oldest: int) -> int:
        """The largest number of committed updates at which a token from `oldest` may still be trained."""
        return oldest + self.max_lag

    def feasible(self, deadlines: Iterable[float] | dict[float, int], committed: int) -> bool:
        """I(committed): whether groups with these deadlines, trained earliest first, all meet them. inf: whenever.

        deadlines: of each group, or how many groups have each.
        """
        rank = -1  # of the last group with a deadline
        counts = deadlines if isinstance(deadlines, dict) else Counter(deadlines)
        for deadline, count in sorted(counts.items()):
            rank += count
            if count and deadline < committed + rank // self.batch_groups:
                return False
        return True

    def misfits(self, groups: Iterable[tuple[int, float]], committed: int) -> list[int]:
        """The fewest groups without which the others are feasible. groups: (id, deadline), those to be kept first in front.

        Sets of unit jobs with deadlines are a matroid, so that taking each that still fits gives a largest feasible set.
        """
        kept: Counter[float] = Counter()
        misfits = []
        for group, deadline in groups:
            kept[deadline] += 1
            if not self.feasible(kept, committed):
                kept[deadline] -= 1
                misfits.append(group)
        return misfits

    def overdue(self, *, oldest: int, committed: int) -> bool:
        """Whether a token from update `oldest` is already too old for the next update."""
        return committed > self.deadline(oldest)

    def trainable(self, updates: np.ndarray, committed: int) -> np.ndarray:
        """Mask [T] bool of the tokens that update `committed + 1` may train: 0 <= lag <= η."""
        lag = committed - updates
        return (lag >= 0) & (lag <= self.max_lag)
