"""When the model runs, and for whom: who gets between two decode steps, and which queued requests join the next one."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from asyncrl.generate.embedded.rows import Job

Room = Callable[[Sequence[Job]], int]  # how many of these jobs, from the first on, there is memory for


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
        """Held by the step loop, for one step."""
        with self._cond:
            self._cond.wait_for(lambda: not self._held and self._outsiders == 0)
            self._held = True
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Held by swaps, aborts and pauses: inside, no step runs."""
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


class JoinAtOnce:
    """First come, first served, into every free slot; but while rows are running, joiners wait for company.

    A prefill costs about a step whatever its size, so filling slots one by one slows a saturated engine (measured on a tiny
    model: by a sixth at 64 slots). Hence a joiner waits until `slots // 8` slots are free (or all that are queued fit), or
    for PATIENCE steps.
    """

    PATIENCE = 8

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._company = max(1, slots // 8)
        self._waited = 0

    def take(self, queue: deque[Job], count: int, room: Room = len) -> list[Job]:
        """Removes from the queue the jobs that join, given `count` rows still running."""
        free = self._slots - count
        wanted = room(list(islice(queue, free)))
        if wanted == 0:
            return []
        alone = count > 0 and wanted < min(self._company, len(queue))
        if alone and self._waited < self.PATIENCE:
            self._waited += 1
            return []
        self._waited = 0
        return [queue.popleft() for _ in range(wanted)]


class GroupAlone:
    """One whole group at a time, ordered by request id, and the next only when it is done: the shape of every forward
    then depends on the group alone, so results repeat to the bit whatever else was asked, and when.

    A group must have been submitted in one call (`submit_group`), or it may be split.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def take(self, queue: deque[Job], count: int, room: Room = len) -> list[Job]:
        """As JoinAtOnce. Alone a group has room, or it was refused."""
        if count > 0 or not queue:
            return []
        group = queue[0].request.group
        joining = [job for job in queue if job.request.group == group][: self._slots]
        for job in joining:
            queue.remove(job)
        return sorted(joining, key=lambda job: job.request.id)
