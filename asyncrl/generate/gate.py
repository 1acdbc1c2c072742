"""Turns on the model: one decode step at a time, and whoever wants to get between two steps goes first."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """A lock with two classes of holders. A plain lock would starve swaps: the step loop takes it back at once.

    A step waits for the running holder and for every outsider that has asked; an outsider waits for one step at most.
    Neither side holds it for longer than a forward pass or a swap, so the waits are bounded by those.
    """

    def __init__(self) -> None:
        self._cond = threading.Condition()
        self._held = False
        self._outsiders = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """For the step loop."""
        with self._cond:
            self._cond.wait_for(lambda: not self._held and self._outsiders == 0)
            self._held = True
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """For swaps, aborts and pauses: inside, no step runs."""
        with self._cond:
            self._outsiders += 1
            self._cond.wait_for(lambda: not self._held)
            self._outsiders -= 1
            self._held = True
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        with self._cond:
            self._held = False
            self._cond.notify_all()
