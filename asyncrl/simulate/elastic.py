"""Simulated generators that come and go: by the rule of `asyncrl.autoscale`, and with nodes that are lent and taken."""

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, cycle, pairwise
from pathlib import Path

from asyncrl.autoscale import Autoscaler
from asyncrl.errors import DataError
from asyncrl.report.loads import LoadMeter
from asyncrl.simulate.generating import SimulatedGenerator
from asyncrl.simulate.world import Process, World
from asyncrl.types import Report

_LOOK_S = 1.0  # between two looks of the rule
Trace = Sequence[tuple[float, int]]  # (seconds, rising from 0; nodes that there are from then on), over and over


def read_trace(path: str) -> Trace:
    """A file with a line `SECONDS NODES` for each change. Raises DataError."""
    try:
        lines = [line.partition("#")[0].split() for line in Path(path).read_text().splitlines()]
        trace = [(float(at), int(nodes)) for at, nodes in filter(None, lines)]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; expected a line SECONDS NODES for each change of the number of nodes") from error
    if not trace or trace[0][0] != 0 or any(after[0] <= before[0] for before, after in pairwise(trace)):
        raise DataError(f"{path}: seconds must begin at 0 and rise; expected a line SECONDS NODES for each change")
    if max(nodes for _, nodes in trace) < 1 or min(nodes for _, nodes in trace) < 0:
        raise DataError(f"{path}: there is never a node; expected a line SECONDS NODES for each change")
    return trace


def random_trace(nodes: int, life_s: float, away_s: float, seed: int, changes: int = 20_000) -> Trace:
    """So many nodes, of which each is taken after `life_s` on average, and there again `away_s` later."""
    rng, at, up = random.Random(seed), 0.0, nodes
    trace = [(0.0, nodes)]
    for _ in range(changes):
        taken, given = up / life_s, (nodes - up) / away_s
        at += rng.expovariate(taken + given)
        up += -1 if rng.random() < taken / (taken + given) else 1
        trace.append((at, up))
    return trace


class SimulatedFleet:
    """Keeps as many generators as there should be, and as there are nodes for."""

    def __init__(self, world: World, trace: Trace | None) -> None:
        spec = world.deployment.generators
        self._world, self._numbers = world, count()
        self.wanted, self._nodes = spec.least, trace[0][1] if trace else spec.most
        self.up: list[SimulatedGenerator] = []
        self._starting: list[Process] = []
        self._leaving: list[SimulatedGenerator] = []
        self._held_s, self._since = 0.0, 0.0
        for _ in range(min(self.wanted, self._nodes)):
            self._join()
        if trace is not None:
            world.start(self._lend(trace))
        if spec.most > spec.least:
            world.start(self._decide())

    @property
    def all(self) -> list[SimulatedGenerator]:
        """Those that generate, and those that finish what they hold."""
        return [*self.up, *self._leaving]

    @property
    def names(self) -> list[str]:
        return [generator.name for generator in self.up]

    def node_seconds(self) -> float:
        """That nodes were held until now, those included on which something still starts."""
        held, now = len(self.up) + len(self._starting) + len(self._leaving), self._world.now
        self._held_s, self._since = self._held_s + held * (now - self._since), now
        return self._held_s

    def _join(self) -> None:
        self.up.append(SimulatedGenerator(self._world, f"generator-{next(self._numbers)}"))
        if self._world.newest >= 0:
            self.up[-1].swap(self._world.newest)

    def _start(self) -> Process:
        yield self._world.costs.start_s
        self.node_seconds()
        self._starting.pop(0)  # they take equally long
        self._join()

    def _give_up(self, starting: int) -> None:
        """All but so many of those that start: their node was taken, or they are wanted no more."""
        for process in self._starting[max(0, starting) :]:
            process.close()
        del self._starting[max(0, starting) :]

    def _fill(self) -> None:
        self.node_seconds()
        room = min(self.wanted, self._nodes - len(self._leaving))
        for _ in range(room - len(self.up) - len(self._starting)):
            self._starting.append(self._start())
            self._world.start(self._starting[-1])
        self._give_up(room - len(self.up))
        while len(self.up) > max(0, self.wanted):
            self._leaving.append(self.up.pop())
            self._leaving[-1].retire(self._left)

    def _left(self, generator: SimulatedGenerator) -> None:
        self.node_seconds()
        self._leaving.remove(generator)
        self._fill()

    def _lend(self, trace: Trace) -> Process:
        """The nodes come and go."""
        times = accumulate(_pauses(trace))
        for (_, nodes), at in zip(cycle([*trace[1:], trace[0]]), times, strict=False):
            yield max(0.0, at - self._world.now)
            self.node_seconds()
            for there in range(self._nodes, nodes, -1):
                self._take(self._world.rng.randrange(there))
            self._nodes = nodes
            self._fill()

    def _take(self, node: int) -> None:
        """With what is on it, if anything is."""
        for generators in (self.up, self._leaving):
            if node < len(generators):
                generators.pop(node).die()
                return
            node -= len(generators)
        if node < len(self._starting):
            self._starting.pop(node).close()

    def _decide(self) -> Process:
        world, spec = self._world, self._world.deployment.generators
        every_s = world.deployment.limits.scale_every_s
        rule, meter = Autoscaler(spec.least, spec.most, every_s, lambda: world.now), LoadMeter()
        while True:
            yield min(_LOOK_S, every_s / 10)
            up, committed, reports = len(self.up), world.core.ledger.committed, self._reports()
            meter.sample(reports)
            if rule.begins(up, self.wanted, committed):
                meter.restart(reports)
            elif rule.due(committed):
                decision = rule.decide(up, self.wanted, committed, meter.load("generator", reports))
                meter.restart(reports)
                if decision is not None:
                    self.wanted = decision.number
                    world.spent["decisions"] += 1
                    each = spec.servers * spec.engine.slots
                    limit = world.recipe.staleness_rule(self.wanted * each, self.wanted).most_outstanding
                    world.call("limit_outstanding", "supervisor", limit)
                    self._fill()

    def _reports(self) -> dict[str, Report]:
        """What a run's actors would report."""
        world = self._world
        limits = world.core.report(world.key("supervisor"), 0).gauges
        found = [
            Report(name="learner", role="learner", seconds=world.learner.seconds(), gauges={}),
            Report(name="store", role="store", seconds={"": world.now}, gauges=limits),
        ]
        found += [Report(name=each.name, role="generator", seconds={}, gauges=each.gauges()) for each in self.up]
        return {report.name: report for report in found}


def _pauses(trace: Trace) -> Iterator[float]:
    """Seconds from one change to the next; what comes last lasts as long as the average."""
    between = [after[0] - before[0] for before, after in pairwise(trace)]
    return cycle([*between, sum(between) / len(between) if between else float("inf")])
