"""What generators, reward workers and the learner hold in their hands: the store's protocols over any transport.

Rows are encoded and decoded here, in the caller's process. A call that could not be delivered is repeated with the same
key, so that it takes effect once.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import asyncrl.replay.log.rows as schema
from asyncrl.errors import Closed, Unavailable
from asyncrl.types import BatchLease, Fence, Key, Reserved, Rollout, Score, TrainRollout, UnscoredLease, Version

_PAUSE_S = (0.05, 1.0)  # between repeats, if the transport does not itself block until the store is back


class Transport(Protocol):
    """Calls a method of the store. Raises `Unavailable` if it did not answer within timeout_s; passes its errors on."""

    def __call__(self, method: str, *args: Any, timeout_s: float) -> Any: ...


class ReplayClient:
    """Implements GeneratorStore, RewardStore and LearnerStore. Thread-safe; a worker has one, and one thread per method.

    worker, incarnation: who calls; the supervisor raises the incarnation at every restart. run: written into the rows.
    retry_s: for how long a call is repeated while the store can't be reached; then `Unavailable`.

    A generator names a group in `held` until the `submit` of its last rollout has returned: otherwise the store takes it
    as lost while the rows are still on their way.
    """

    def __init__(self, call: Transport, worker: str, incarnation: int, run: str = "", retry_s: float = 60.0) -> None:
        self._call = call
        self._worker = worker
        self._incarnation = incarnation
        self._run = run
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._sequence = 0
        self._learner = 0  # the incarnation that `fence` gave
        self._closed = threading.Event()

    # GeneratorStore

    def reserve(self, k: int, version: Version, held: Sequence[int], wait_s: float) -> Reserved:
        return self._send("reserve", k, version, tuple(held), wait_s, wait_s=wait_s)

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        if rollouts:
            self._send("submit", schema.encode_rollouts(rollouts, self._run))

    # RewardStore

    def lease_unscored(self, k: int, wait_s: float) -> UnscoredLease:
        got = self._send("lease_unscored", k, wait_s, wait_s=wait_s)
        items = schema.decode_unscored(schema.from_ipc(got.rows)) if got.rows else ()
        return UnscoredLease(lease=got.lease, lease_s=got.lease_s, items=items, ended=got.ended)

    def extend(self, lease: int) -> None:
        self._send("extend", lease)

    def score(self, lease: int, scores: Sequence[Score]) -> None:
        self._send("score", lease, tuple(scores))

    # LearnerStore

    def fence(self, committed: int) -> Fence:
        fence = self._send("fence", committed)
        self._learner = fence.incarnation
        return fence

    def lease_batch(self, update: int, wait_s: float) -> BatchLease:
        return self._send("lease_batch", self._learner, update, wait_s, wait_s=wait_s)

    def rows(self, groups: Sequence[int]) -> list[TrainRollout]:
        got = self._send("rows", self._learner, tuple(groups))
        return schema.decode_train(schema.from_ipc(got.rows), got.scores)

    def commit(self, lease: int, version: Version, metrics: Mapping[str, float]) -> None:
        self._send("commit", lease, version, dict(metrics))

    def request_eval(self, version: Version) -> None:
        self._send("request_eval", version)

    def checkpointed(self, oldest_retained: int) -> None:
        self._send("checkpointed", oldest_retained)

    def close(self) -> None:
        """Makes a call that is being repeated raise `Closed`."""
        self._closed.set()

    def _send(self, method: str, *args: Any, wait_s: float = 0.0) -> Any:
        with self._lock:
            self._sequence += 1
            key = Key(self._worker, self._incarnation, self._sequence)
        deadline, pause_s = time.monotonic() + wait_s + self._retry_s, _PAUSE_S[0]
        while True:
            try:
                return self._call(method, key, *args, timeout_s=deadline - time.monotonic())
            except Unavailable:
                if time.monotonic() + pause_s >= deadline:
                    raise
            if self._closed.wait(pause_s):
                raise Closed(f"{self._worker}: closed while the store could not be reached")
            pause_s = min(2 * pause_s, _PAUSE_S[1])
