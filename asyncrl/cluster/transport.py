"""Calls to the store over Ray, across the store's restarts."""

import time
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayActorError

from asyncrl.cluster.peers import Peers
from asyncrl.errors import Unavailable

# Calls by who makes them: each kind has an event loop of its own in the store, so that long polls never starve a commit.
STORE_CALLS = {
    "generate": ("reserve", "submit"),
    "reward": ("lease_unscored", "extend", "score"),
    "learn": ("fence", "lease_batch", "rows", "commit", "request_eval", "checkpointed"),
    "supervise": ("finish", "forget", "report", "state"),
}
RECONNECT_S = 1.0
GROUP_OF = {method: group for group, methods in STORE_CALLS.items() for method in methods}


def call_store(handle: Any, method: str, *arguments: Any) -> Any:
    """Asks the store actor; returns Ray's reference to the answer."""
    return handle.call.options(concurrency_group=GROUP_OF[method]).remote(method, *arguments)


class RayCall:
    """The transport of a ReplayClient: `call(method, *args)` on whatever store incarnation lives now."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def __call__(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Blocks for the answer. A store that dies meanwhile is waited for and asked again, one that merely can't be reached
        soon: the idempotency key among `args` makes that safe. Raises Unavailable after `timeout_s`, Closed when the actor
        stops; the store's own errors pass."""
        deadline = time.monotonic() + timeout_s
        edition, handle = self._peers.wait("store", -1, deadline)
        while True:
            try:
                return ray.get(call_store(handle, method, *args), timeout=max(deadline - time.monotonic(), 0.001))
            except ActorUnavailableError:
                edition, handle = self._another(edition, handle, deadline)
            except (RayActorError, OutOfMemoryError):  # the latter: killed by Ray's memory monitor
                edition, handle = self._peers.wait("store", edition, deadline)
            except GetTimeoutError:
                raise Unavailable(f"store: no answer to {method} within {timeout_s:.0f} s") from None

    def _another(self, edition: int, handle: Any, deadline: float) -> tuple[int, Any]:
        """A newer store, if one comes within RECONNECT_S; else the same."""
        try:
            return self._peers.wait("store", edition, min(deadline, time.monotonic() + RECONNECT_S))
        except Unavailable:
            if time.monotonic() >= deadline:
                raise
            return edition, handle
