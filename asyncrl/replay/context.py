"""What the parts of the store share, and how they say who need not wait any longer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import asyncrl.replay.log.events as ev
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.plan import StorePlan
from asyncrl.report.timing import AwakeClock

_MOVES_NOTHING = ev.GroupReserved | ev.GroupReissued | ev.HolderDied

Topic = Literal["tickets", "unscored", "batch", "all"]  # what a call waits for; `all`: everybody may get another reply
_ROLLOUTS = ev.RolloutSubmitted | ev.RolloutScored
_STIRS_GROUPS = ev.GroupSettled | ev.GroupsUnused | ev.BatchCommitted | ev.HolderDied  # their holders may have lost them
_STIRS_ALL = ev.LearnerFenced | ev.Ended | ev.EvalRequested | ev.EvalPinned | ev.Evaluated


class Poll(NamedTuple):
    """What a verb that waits returns: `attempt` is tried now and again whenever something has changed that the call waits for,
    until it is done or wait_s have passed; its last reply is the answer."""

    attempt: Callable[[], tuple[bool, Any]]
    wait_s: float
    topic: Topic
    held: Sequence[int] = ()  # groups: what becomes of them is waited for, too


class StoreContext:
    """What the parts of the store share: the ledger, the one way to change it, and the log. clock: monotonic seconds; wall:
    seconds since the epoch, for events.

    After an exception out of the log, or out of the user's keep function, memory may be ahead of the log: `broken` says so,
    and the store must be rebuilt.
    """

    def __init__(self, plan: StorePlan, log: ReplayLog, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.plan = plan
        self.log = log
        self.clock = AwakeClock(clock, plan.lease_s / 10)
        self.wall = wall
        self.ledger = Ledger.load(log.state, plan.rule.max_lag) if log.state else Ledger(plan.rule.max_lag)
        self.stirred: dict[Topic | int | str, None] = {}  # topics, groups and workers: who waits for one may get another reply
        self.touched: set[int] = set()  # groups that `Outstanding` has to look at again
        self.activity = log.events_closed  # rises with every accepted call that moved data
        self.finished = False  # volatile: after a restart the end is told again only by `finish`, as a resume may undo it
        self.broken: BaseException | None = None
        self._recorded: list[ev.Event] = []
        for event in log.history:
            self.ledger.apply(event)
        log.history, log.state = [], b""
        self._take_snapshot()
        self.touched.update(group.id for group in self.ledger.outstanding())

    def record(self, event: ev.Event) -> None:
        """Applies the event at once; `write` hands it to the log."""
        groups = event.concerned()
        self.touched.update([group.id for group in self.ledger.outstanding()] if groups is None else groups)
        self.ledger.apply(event)
        self._recorded.append(event)
        self.activity += not isinstance(event, _MOVES_NOTHING)
        if isinstance(event, _ROLLOUTS):
            self.stir("batch", *(["tickets"] if self.ledger.deaths else []))
        elif isinstance(event, _STIRS_ALL):
            self.touched.update(group.id for group in self.ledger.outstanding())
            self.stir("all")
        elif not isinstance(event, ev.GroupReserved | ev.GroupReissued | ev.RolloutStreamed):
            self.stir("batch", "tickets", *(groups or () if isinstance(event, _STIRS_GROUPS) else ()))

    def stir(self, *names: Topic | int | str) -> None:
        """Who waits for one of these may get another reply."""
        self.stirred.update(dict.fromkeys(names))

    @property
    def unwritten(self) -> bool:
        """Whether something was recorded that the log does not hold yet: no reply that knows of it may go out."""
        return bool(self._recorded)

    def write(self) -> None:
        """Hands what was recorded to the log, whole or not at all."""
        recorded, self._recorded = self._recorded, []
        try:
            if recorded:
                self.log.append_events(recorded)
            if self.broken is None:  # else the ledger may be ahead
                self._take_snapshot()
        except BaseException as error:
            self.broken = error
            raise

    def _take_snapshot(self) -> None:
        if self.log.due:
            self.log.snapshot(self.ledger.dump())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around a call: one that fails halfway breaks the store, and nothing of it is written."""
        before = len(self._recorded)
        try:
            yield
        except BaseException as error:
            if len(self._recorded) > before:
                self.broken = error
                del self._recorded[before:]
            raise

    def lease_end(self) -> float:
        """When, on `clock`, a worker's lease ends that is given or renewed now."""
        return self.clock() + self.plan.lease_s

    def ended(self) -> bool:
        """Whether nobody will get work any more."""
        return self.finished and self.ledger.ended and self.ledger.round is None

    def exhausted(self) -> bool:
        """Whether no prompt is left to reserve: the epochs are over and nothing waits for another try."""
        total = self.plan.source.total
        return total is not None and self.ledger.cursor >= total and not self.ledger.retries

    def may_retry(self, retry: int) -> bool:
        """Whether the prompt of a group with this `retry` may be tried once more."""
        return retry + 1 < self.plan.sampling.max_attempts
