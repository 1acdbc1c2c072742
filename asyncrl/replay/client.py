"""What generators, reward workers, the learner and the supervisor hold in their hands: the store over any transport.

Rows are encoded and decoded here, in the caller's process. A call that could not be delivered is repeated with the same
key, so that it takes effect once.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from asyncrl.errors import Closed, Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.lineage import Fence
from asyncrl.replay.log.pieces import encode_pieces
from asyncrl.replay.log.rows import RowLease, TrainRows, encode_rollouts
from asyncrl.types import Key, Rollout, RolloutPiece

_PAUSE_S = (0.05, 1.0)  # between repeats, if the transport does not itself block until the store is back


class Transport(Protocol):
    """Calls the store. Raises `Unavailable` if it did not reply within timeout_s; passes its errors on."""

    def __call__(self, verb: str, key: Key, *args: Any, timeout_s: float) -> Any: ...


class ReplayClient:
    """Implements the protocols GeneratorStore, RewardStore, LearnerStore and SupervisorStore: each of their verbs is a method.

    Thread-safe; a worker has one client, and one thread per verb. worker, incarnation: who calls; the supervisor raises the
    incarnation at every restart. run: written into the rows. retry_s: for how long a call is repeated while the store can't
    be reached; then `Unavailable`.

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

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in VERBS:
            raise AttributeError(f"the store has no verb {verb!r}: its verbs are {', '.join(VERBS)}")
        return partial(self._send, verb)

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        if rollouts:
            self._send("submit", encode_rollouts(rollouts, self._run))

    def stream(self, pieces: Sequence[RolloutPiece]) -> None:
        if pieces:
            self._send("stream", encode_pieces(pieces))

    def close(self) -> None:
        """Makes a call that is being repeated raise `Closed`."""
        self._closed.set()

    def _send(self, verb: str, *args: Any, **named: Any) -> Any:
        bound = VERBS[verb].signature.bind(self, *args, **named)
        with self._lock:
            self._sequence += 1
            key = Key(self._worker, self._incarnation, self._sequence, self._learner)
        deadline = time.monotonic() + bound.arguments.get("wait_s", 0.0) + self._retry_s
        reply = self._repeat(verb, key, bound.args[1:], deadline)
        if isinstance(reply, Fence):
            self._learner = reply.incarnation
        return reply.decode() if isinstance(reply, RowLease | TrainRows) else reply

    def _repeat(self, verb: str, key: Key, args: Sequence[Any], deadline: float) -> Any:
        """Calls until there is a reply. Raises `Unavailable` at the deadline (monotonic seconds), `Closed` after `close`."""
        pause_s = _PAUSE_S[0]
        while True:
            try:
                return self._call(verb, key, *args, timeout_s=deadline - time.monotonic())
            except Unavailable:
                if time.monotonic() + pause_s >= deadline:
                    raise
            if self._closed.wait(pause_s):
                raise Closed(f"{self._worker}: closed while the store could not be reached")
            pause_s = min(2 * pause_s, _PAUSE_S[1])
