"""What the supervisor concludes from clocks: that nobody gets anything done, that an actor fails too often. No Ray."""

from collections import deque
from collections.abc import Callable, Mapping

from asyncrl.report.timing import TimeInState
from asyncrl.types import Report, StoreReport

Clock = Callable[[], float]  # seconds, monotonic


class StallWatch:
    """Notices that nothing has moved for `limit_s`: neither the store nor any actor's `progress`; in a gang no rank's."""

    def __init__(self, limit_s: float, clock: Clock) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._moved_at = clock()
        self._state: object = None  # of all that moves, as of then
        self._seconds: dict[str, Mapping[str, float]] = {}  # each actor's time by state, as of then

    def stalled(self, store: StoreReport | None, actors: Mapping[str, Report], *, excused: bool) -> str:
        """If nothing has moved for the limit, what each actor was doing all the time; else empty.

        store: None where it does not matter. excused: nothing has to move now, for something starts that has a limit of its
        own, or nothing was asked for.
        """
        state = (
            store and (store.committed, store.counts, store.activity),
            {name: report.progress for name, report in actors.items()},
        )
        if excused or state != self._state:
            self._moved_at, self._state = self._clock(), state
            self._seconds = {name: report.seconds for name, report in actors.items()}
        if self._clock() - self._moved_at <= self._limit_s:
            return ""
        return ", ".join(f"{name} {report.doing or self._longest(report)}" for name, report in sorted(actors.items()))

    def _longest(self, report: Report) -> str:
        before = self._seconds.get(report.name, {})
        return max(report.seconds, key=lambda state: report.seconds[state] - before.get(state, 0.0), default="silent")


class RestartBudget:
    """The failures of one actor that count: those of the last `window_s` seconds in which it was up.

    Only time in which it was up lets a failure be forgotten: an actor that takes an hour to start, and dies of it every time,
    ends the run as one does that starts in a second. The window holds as many starts as may fail, since an actor counts as up
    while its SGLang server starts.
    """

    def __init__(self, window_s: float, clock: Clock) -> None:
        self._window_s = window_s
        self._time = TimeInState("down", clock)
        self._failures: deque[tuple[float, str]] = deque()  # seconds that it had been up by then, and the error

    def up(self) -> None:
        """The actor has started."""
        self._time.enter("up")

    def failed(self, error: str) -> list[str]:
        """Notes a failure, and returns the errors of those that count, oldest first."""
        self.down()
        up_s = self._time.seconds().get("up", 0.0)
        self._failures.append((up_s, error))
        while up_s - self._failures[0][0] > self._window_s:
            self._failures.popleft()
        return [error for _, error in self._failures]

    def down(self) -> None:
        """The actor has gone; it may not have failed."""
        self._time.enter("down")

    def forgive(self) -> None:
        """What failed so far is explained, and counts no longer."""
        self._failures.clear()
