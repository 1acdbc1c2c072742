"""The board on which the supervisor tells an actor where its peers are now. Pushed, never polled."""

import threading
import time
from typing import Any

from asyncrl.errors import Closed, Unavailable


class Peers:
    """Newest known address or handle per peer name. The supervisor puts; the actor's own threads wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._known: dict[str, tuple[int, Any]] = {}
        self._closed = False

    def put(self, name: str, edition: int, value: Any) -> None:
        """Notes where `name` is. Editions rise with every restart; an older one changes nothing."""
        with self._changed:
            if edition > self._known.get(name, (-1, None))[0]:
                self._known[name] = (edition, value)
                self._changed.notify_all()

    def peek(self, name: str) -> Any:
        """The newest value, or None."""
        with self._changed:
            return self._known.get(name, (-1, None))[1]

    def wait(self, name: str, newer_than: int, deadline: float) -> tuple[int, Any]:
        """Blocks until `name` has an edition above `newer_than`; `put` wakes it.

        Raises Closed when the actor stops, Unavailable at `deadline` (time.monotonic seconds).
        """
        with self._changed:
            while True:
                if self._closed:
                    raise Closed(f"stopped while waiting for {name}")
                edition, value = self._known.get(name, (-1, None))
                if edition > newer_than:
                    return edition, value
                if (left := deadline - time.monotonic()) <= 0:
                    raise Unavailable(f"{name}: no living incarnation was announced before the deadline")
                self._changed.wait(left)

    def close(self) -> None:
        """Wakes every waiter with Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
