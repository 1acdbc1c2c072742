"""What the parts of the core share: the ledger, and the one way to change it."""

from collections.abc import Callable

from asyncrl.replay.events import AnyEvent
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.order import PromptOrder
from asyncrl.replay.plan import Plan


class Book:
    """`record` applies an event at once and remembers it; the core hands what was recorded to the log before it answers."""

    def __init__(self, plan: Plan, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        source = plan.source
        self.plan = plan
        self.clock = clock
        self.wall = wall
        self.order = PromptOrder(len(source.prompts), source.seed, source.shuffle, source.epochs)
        self.ledger = Ledger(plan.rule.max_lag)
        self.recorded: list[AnyEvent] = []

    def record(self, event: AnyEvent) -> None:
        self.ledger.apply(event)
        self.recorded.append(event)

    def exhausted(self) -> bool:
        """Whether no prompt is left to reserve: the epochs are over and nothing waits for another try."""
        total = self.order.total
        return total is not None and self.ledger.cursor >= total and not self.ledger.retries

    def may_retry(self, retry: int) -> bool:
        """Whether the prompt of a group with this `retry` may be tried once more."""
        return retry + 1 < self.plan.grouping.max_attempts
