"""What every call asks of the outstanding groups, kept up to date group by group: nothing here is counted anew."""

from collections import Counter, defaultdict
from collections.abc import Callable

from asyncrl.replay.context import StoreContext
from asyncrl.replay.state import Group


class Outstanding:
    """Looks again at the groups that `StoreContext.touched` names, whenever it is asked.

    deadline: how many updates may be committed before a group is in a batch. landed: is told of what is no longer in flight.
    """

    def __init__(self, context: StoreContext, deadline: Callable[[Group], float], landed: Callable[[int], None]) -> None:
        self._context = context
        self._deadline_of = deadline
        self._landed = landed
        self._deadlines: dict[int, tuple[bool, float]] = {}  # of training groups in no batch: whether it is ready, and when due
        self._due = {False: Counter[float](), True: Counter[float]()}  # how many of those there are by deadline
        self._holders: dict[int, str] = {}  # of the groups in flight
        self._held: defaultdict[str, dict[int, Group]] = defaultdict(dict)  # the same, by holder
        self._since: dict[int, float] = {}

    def held_by(self, worker: str) -> list[Group]:
        """Groups in flight, those for training first, oldest first."""
        self.look()
        return sorted(self._held.get(worker, {}).values(), key=lambda group: (group.purpose == "eval", group.id))

    def deadline(self, group: int) -> float:
        """Of a training group that is in no batch."""
        self.look()
        return self._deadlines[group][1]

    def due(self) -> Counter[float]:
        """How many training groups in no batch have each deadline: the caller's own copy."""
        self.look()
        return self._due[False] + self._due[True]

    def due_but(self, batch: int) -> Counter[float]:
        """The same without `batch` ready groups, those of the earliest deadlines."""
        self.look()
        due = self._due[False].copy()
        for deadline, count in sorted(self._due[True].items()):
            due[deadline] += max(0, count - batch)
            batch -= min(count, batch)
        return due

    def since(self, group: int) -> float | None:
        """When a group in flight was first looked at."""
        self.look()
        return self._since.get(group)

    def look(self) -> None:
        if self._context.touched:
            for group in self._context.touched:
                self._forget(group)
                self._note(group)
            self._context.touched.clear()

    def _forget(self, group: int) -> None:
        if group in self._deadlines:
            ready, deadline = self._deadlines.pop(group)
            self._due[ready][deadline] -= 1
            if not self._due[ready][deadline]:
                del self._due[ready][deadline]
        if (holder := self._holders.pop(group, None)) is not None:
            del self._held[holder][group]

    def _note(self, number: int) -> None:
        ledger = self._context.ledger
        group = ledger.find(number)
        if group is not None and group.in_flight():
            self._holders[number] = group.worker
            self._held[group.worker][number] = group
            self._since.setdefault(number, self._context.clock())
        else:
            self._since.pop(number, None)
            self._landed(number)
        if group is not None and group.purpose == "train" and number not in ledger.taken:
            self._deadlines[number] = ready, deadline = number in ledger.ready, self._deadline_of(group)
            self._due[ready][deadline] += 1
