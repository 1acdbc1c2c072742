"""Where an actor's time goes. One exclusive state at a time, so that the states add up to wall clock by construction."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class AwakeClock:
    """Seconds for which this process was awake, for what others are given to be heard: who can't be heard is not silent.

    Between two readings `step_s` count at the most. Its owner reads it more often; where more time went by, the process was
    stopped (Ctrl-Z, a debugger) or held up (a slow disk), and heard nobody meanwhile.
    """

    def __init__(self, clock: Callable[[], float], step_s: float) -> None:
        self.step_s = step_s
        self._clock = clock
        self._read, self._awake = clock(), 0.0

    def __call__(self) -> float:
        now = self._clock()
        self._awake += min(now - self._read, self.step_s)
        self._read = now
        return self._awake


def time_shares(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How the time between two readings of `TimeInState.seconds` divides into states: parts of 1. Empty if no time has passed.

    An actor that was restarted meanwhile counts from nothing again: it is judged since then.
    """
    spent = {state: seconds - before.get(state, 0.0) for state, seconds in after.items()}
    if any(after.get(state, 0.0) < seconds for state, seconds in before.items()):
        spent = dict(after)
    in_all = sum(spent.values())
    return {state: seconds / in_all for state, seconds in spent.items()} if in_all > 0 else {}


class TimeInState:
    """Divides the wall clock of one main loop into states: `busy`, `sync`, or `wait:<whom>`.

    Written by the loop's own thread with `enter`/`span`; read by any thread with `seconds`.
    """

    def __init__(self, state: str = "wait:start", clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._state = state
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def enter(self, state: str) -> str:
        """Ends the current state and begins `state`; returns the one that ended."""
        with self._lock:
            now = self._clock()
            self._seconds[self._state] = self._seconds.get(self._state, 0.0) + now - self._since
            ended, self._state, self._since = self._state, state, now
            return ended

    @contextmanager
    def span(self, state: str) -> Iterator[None]:
        """Time inside the block counts as `state`; afterwards the former state goes on."""
        former = self.enter(state)
        try:
            yield
        finally:
            self.enter(former)

    def seconds(self) -> dict[str, float]:
        """Seconds per state up to now, the running state included."""
        with self._lock:
            seconds = dict(self._seconds)
            seconds[self._state] = seconds.get(self._state, 0.0) + self._clock() - self._since
            return seconds
