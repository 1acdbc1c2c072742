"""A generator of a simulated run."""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from typing import Any, NamedTuple

from asyncrl.generate.generator import SUBMIT_EVERY_S
from asyncrl.generate.workload import tickets_wanted
from asyncrl.replay.log.rows import Summary
from asyncrl.simulate.world import Process, World
from asyncrl.types import TOO_OLD, Score, Ticket, Version

_PATIENCE = 8  # steps after which an engine looks for requests and weights, if no row has ended


class Row(NamedTuple):
    """A rollout in an engine."""

    end: int  # the engine's step after which it ends
    number: int  # in the order in which rows joined
    ticket: Ticket
    rollout: int
    weights: list[tuple[int, int]]  # (step, update of the weights from there on)


class SimulatedGenerator:
    """`Generator` with an engine that batches continuously and swaps in flight."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self.name = world, name
        generators = world.deployment.generators
        self._servers = generators.servers
        self._slots = self._servers * generators.engine.slots
        self._rows: list[Row] = []  # a heap
        self._queue: deque[tuple[Ticket, int, int]] = deque()  # rollouts without a slot, with number and length
        self._step = 0
        self._update = self._coming = -1  # of the weights in use, and of the newest
        self._missing: dict[int, int] = {}  # rollouts that the store does not have yet, by group
        self._asking = self._too_old = False
        self._left: Callable[[SimulatedGenerator], None] | None = None  # is to be told, when all that is held has ended
        self._processes = [self._decode(), self._feed()]
        for process in self._processes:
            world.start(process)

    def gauges(self) -> dict[str, float]:
        return {"active_slots": float(min(self._slots, len(self._rows) + len(self._queue))), "slots": float(self._slots)}

    def retire(self, left: "Callable[[SimulatedGenerator], None]") -> None:
        """Reserves no more; `left` is called when what it holds has ended."""
        self._left = left
        self._world.start(self._drain())

    def _drain(self) -> Process:
        yield (self.name,), lambda: (not (self._asking or self._missing), None)
        if self._left is not None:
            self._left(self)
            self.die()

    def die(self) -> None:
        """Its node is gone, and what it held is lost. Idempotent."""
        self._left, processes, self._processes = None, self._processes, []
        for process in processes:
            self._world.end(process)
        begun = [row.weights[0][0] for row in self._rows]
        self._world.spent["lost"] += float(self._step * len(begun) - sum(begun))
        self._world.call("forget", "supervisor", self.name, 1, True)

    def swap(self, update: int) -> None:
        """Weights have come: they are in use from the next look between two steps on."""
        self._coming = update
        self._world.stir(self.name)

    def _decode(self) -> Process:
        world, costs, numbers = self._world, self._world.costs, count()
        while True:
            if self._coming != self._update and not self._asking:
                self._update, self._too_old = self._coming, False
                for row in self._rows:
                    row.weights.append((self._step, self._update))
                world.spent[self.name] += costs.pause_s
                world.spent["generating"] += costs.pause_s
                yield costs.pause_s
                world.stir(self.name)  # `_feed` may ask again
            while self._queue and len(self._rows) < self._slots:
                ticket, rollout, length = self._queue.popleft()
                row = Row(self._step + length, next(numbers), ticket, rollout, [(self._step, self._update)])
                heapq.heappush(self._rows, row)
            if not self._rows:
                yield (self.name,), lambda: (bool(self._queue) or (self._coming != self._update and not self._asking), None)
                continue
            steps = min(_PATIENCE, self._rows[0].end - self._step)
            seconds = steps * (costs.step_s + costs.row_s * len(self._rows) / self._servers)
            world.spent[self.name] += seconds
            world.spent["generating"] += seconds
            world.spent["rows"] += seconds * len(self._rows)
            yield seconds
            self._step += steps
            ended = []
            while self._rows and self._rows[0].end <= self._step:
                ended.append(heapq.heappop(self._rows))
            if ended:
                world.start(self._submit(ended))
                world.stir(self.name)

    def _feed(self) -> Process:
        while True:
            reserved = yield ("tickets", self.name), self._ask
            yield self._world.costs.call_s
            self._asking, self._too_old = False, reserved.waiting_for == TOO_OLD
            if reserved.cancelled:
                self._missing = {group: left for group, left in self._missing.items() if group not in reserved.cancelled}
                self._queue = deque(waiting for waiting in self._queue if waiting[0].group in self._missing)
                self._rows = sorted(row for row in self._rows if row.ticket.group in self._missing)
            for ticket in reserved.tickets:
                self._missing[ticket.group] = size = len(ticket.rollouts)
                self._queue += [(ticket, *row) for row in zip(ticket.rollouts, self._world.lengths(size), strict=True)]
            self._world.stir(self.name)

    def _ask(self) -> tuple[bool, Any]:
        """For as many tickets as a `Generator` that asks for none ahead."""
        wanted = tickets_wanted(self._slots, len(self._rows) + len(self._queue), self._world.recipe.rollouts_per_group)
        if not wanted or self._left is not None or self._too_old or self._coming != self._update or self._update < 0:
            return False, None
        version, held = Version(1, self._update), tuple(self._missing)
        self._asking, reserved = self._world.call("reserve", self.name, wanted, version, held, 0.0).attempt()
        return self._asking, reserved

    def _submit(self, rows: Sequence[Row]) -> Process:
        """Submits rollouts; and has them scored, first come first served. Those of one that died are lost on the way."""
        yield self._world.costs.call_s + SUBMIT_EVERY_S / 2
        if not self._processes:
            self._world.spent["lost"] += float(sum(row.end - row.weights[0][0] for row in rows))
            return
        scoring, summaries = self._world.core.scoring, []
        for row in rows:
            ends = pairwise([*row.weights, (row.end, -1)])
            spans = [(update, end - step) for (step, update), (end, _) in ends if end > step]
            group, length = row.ticket.group, row.end - row.weights[0][0]
            self._world.spans[group, row.rollout] = spans
            summaries.append(Summary(group, row.rollout, row.ticket.attempt, spans[0][0], spans[-1][0], length, None, ""))
            if group in self._missing:
                self._missing[group] -= 1
                if not self._missing[group]:
                    del self._missing[group]
        self._world.stir(self.name)
        taken = [summaries[i] for i in scoring.acceptable(summaries)]
        scoring.submitted(taken, 0)
        # A reward actor leases them, and says what it found.
        yield self._world.score_s(len(taken)) + 2 * self._world.costs.call_s
        scores = [Score(group=s.group, rollout=s.rollout, attempt=s.attempt, status="ok", reward=1.0) for s in taken]
        self._world.call("score", "reward", 0, scores)
