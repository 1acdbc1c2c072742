"""How many actors of a kind a run has use for: a rule over what was seen of it. Pure: the supervisor and the simulator run it.

Up where the learner waits for what they make, and they are not held back: as many as would keep it at work. Down where nobody
waits and they are held back at the reserve-ahead: as many as do the same work with a fifth of their room left. Between the two
nothing changes, and no decision comes sooner than `every_s`, or three updates, after what the last one decided is there.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

SHORT, CALM = 0.1, 0.02  # shares of the time in which the learner waits: from the former on up, below the latter down
HELD = 0.3  # share of the time in which actors get no more work, from which on there are too many, or enough
FILLED = 0.8  # share of their room that the actors use which are left
UPDATES = 3  # at least so many fall into what is judged, if it does not take PATIENCE times as long as it should
PATIENCE = 10
CALMS = 2  # looks in a row that have to say that there are too many
THERE = 0.8  # share of what was decided on that is enough: where nodes come and go, some are always on their way


class Load(Struct, frozen=True, kw_only=True):
    """What was seen of actors of a kind, in shares of the time."""

    short: float  # in which the learner waited for what they make
    held: float  # in which they got no more work although they had room for it
    used: float  # of their room: slots of engines, processes


class Decision(NamedTuple):
    number: int
    reason: str


def wanted(up: int, load: Load, least: int, most: int) -> Decision | None:
    """What the load asks for, of `up` actors that are at work; None: as many as there are."""
    if load.short >= SHORT and load.held < HELD:
        needed = math.ceil(up / (1 - min(load.short, 0.5)))  # twice as many at the most
        return Decision(min(needed, most), f"the learner waited for {load.short:.0%} of the time")
    if load.short < CALM and load.held >= HELD:
        needed = max(math.ceil(max(up * load.used / FILLED, up / 2) - 1e-9), least)
        if needed >= up:
            return None
        return Decision(needed, f"held back for {load.held:.0%} of the time, with {load.used:.0%} of the room used")
    return None


class Autoscaler:
    """Decides for actors of one kind. every_s: seconds, as those of clock."""

    def __init__(self, least: int, most: int, every_s: float, clock: Callable[[], float]) -> None:
        self._least, self._most, self._every_s, self._clock = least, most, every_s, clock
        self._since, self._from = clock(), 0  # what is judged began then, and at that update
        self._calms = 0
        self._there = False  # whether what the last decision asked for was up

    def begins(self, up: int, count: int, committed: int) -> bool:
        """Whether what is judged begins only now: the run has made its first update, or what was decided on is up, most of it.
        It is not waited for without end: nodes for that may never come."""
        late = self._clock() - self._since >= PATIENCE * self._every_s
        if self._there or not committed or (up < THERE * count and not late):
            return False
        self._since, self._from, self._there = self._clock(), committed, True
        return True

    def due(self, committed: int) -> bool:
        """Whether there is enough to judge."""
        seconds = self._clock() - self._since
        enough = committed - self._from >= UPDATES or seconds >= PATIENCE * self._every_s
        return self._there and seconds >= self._every_s and enough

    def decide(self, up: int, count: int, committed: int, load: Load) -> Decision | None:
        """Another count than the present one, and why; or None. up: of these, how many are at work. Call it when it is `due`;
        what is judged next begins now."""
        self._since, self._from = self._clock(), committed
        found = wanted(up, load, self._least, self._most)
        most = count if up >= THERE * count else math.inf
        if found is None or up < found.number <= most:  # those on their way may be enough
            found = Decision(count, "")
        self._calms = self._calms + 1 if found.number < count else 0
        if found.number == count or 0 < self._calms < CALMS:
            return None
        self._calms, self._there = 0, found.number < count
        return found
