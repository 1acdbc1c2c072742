"""The next batch, leased and read while the learner still trains the one before.

learner   take(c) ─► ask(c+1) ─► train c ─► commit ─► publish ─► take(c+1) ─► …
helper                  └─► lease_batch(c+1) ─► rows(c+1) ───────────┘
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

from asyncrl.interfaces import LearnerStore
from asyncrl.types import BatchLease, TrainRollout


class LeasedBatch(NamedTuple):
    """A lease and its rows. rows_s: how long these took to come, in the helper thread."""

    lease: BatchLease
    rollouts: list[TrainRollout]
    rows_s: float


class Prefetch:
    """A helper thread, for as long as its `with` block, that fetches one batch at a time.

    A batch is asked for by the update after which it will be trained: the store applies the bound for that moment, not for
    the moment of asking. Whoever asks must train the batch: a lease ends only by its commit or a newer fence.
    Leaving the block waits for the poll under way, `poll_s` at most while the store lives. over: checked between polls.
    """

    def __init__(self, store: LearnerStore, poll_s: float, over: Callable[[], bool]) -> None:
        self._store = store
        self._poll_s = poll_s
        self._over = over
        self._left = threading.Event()
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: Future[LeasedBatch | None] | None = None

    def ask(self, update: int) -> None:
        """Begins to fetch the batch that will be trained after `update`. Returns at once; the one before must be taken."""
        assert self._coming is None, "asked for a second batch ahead"
        self._coming = self._helper.submit(self._fetch, update)

    def take(self) -> LeasedBatch | None:
        """Waits for what was asked for. None: the data has ended, or it is `over`. Raises what the store raised."""
        assert self._coming is not None, "took a batch that nobody asked for"
        coming, self._coming = self._coming, None
        return coming.result()

    def _fetch(self, update: int) -> LeasedBatch | None:
        while not (self._over() or self._left.is_set()):
            lease = self._store.lease_batch(update, self._poll_s)
            if lease.groups:
                began = time.monotonic()
                rollouts = self._store.rows(lease.groups)
                return LeasedBatch(lease, rollouts, time.monotonic() - began)
            if lease.ended:
                return None
        return None

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._helper.shutdown()
