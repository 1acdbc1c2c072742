"""A run in simulated time: the production store, and machines that do what theirs do, for as long as the `Costs` say.

A machine is a process: a Python generator that yields what it waits for, seconds or an answer of the store. Those that are due
go on in order, and no time passes but from one to the next.
"""

import heapq
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from asyncrl.config import Deployment, Recipe
from asyncrl.generate.generator import SUBMIT_EVERY_S
from asyncrl.generate.workload import tickets_wanted
from asyncrl.replay.core import StoreCore
from asyncrl.replay.log.rows import Summary
from asyncrl.replay.plan import Source, StorePlan
from asyncrl.report.timing import TimeInState
from asyncrl.simulate.costs import Costs, Lengths
from asyncrl.simulate.elastic import SimulatedFleet, Trace
from asyncrl.types import TOO_OLD, BatchLease, Key, Prompt, Sampling, Score, Ticket, Version

Attempt = Callable[[], tuple[bool, Any]]  # whether there is an answer, and the answer
Process = Generator[float | tuple[Sequence[str], Attempt], Any, None]  # seconds; or what an attempt waits for, as `Poll` has it
_SKIPPED = 5  # the first fifth of the updates is left out: until all is under way
_PATIENCE = 8  # steps after which an engine looks for requests and weights, if no row has ended


def simulate(
    recipe: Recipe, deployment: Deployment, costs: Costs, lengths: Lengths, updates: int, trace: Trace | None = None
) -> dict[str, float]:
    """Figures of so many updates, their start left out: rollouts in batches, and their tokens that were not masked, per second;
    shares of the time in which somebody had nothing to do; share of the slots that were decoded; lag of trained tokens; share
    of the tokens in batches that were masked, and of the groups that were evicted; generators that there were, and their hours;
    share of the tokens that were lost with a generator. trace: of the nodes that there are; None: as many as are
    wanted. Raises ConfigError where a run would, because nothing is left to train."""
    world = World(recipe, deployment, costs, lengths)
    fleet = world.fleet = SimulatedFleet(world, SimulatedGenerator, trace)
    leased: list[BatchLease] = []
    for process in (learn(world, leased), lease(world, leased)):
        world.start(process)
    before = world.run(updates // _SKIPPED)
    stayed = {*fleet.names}
    spent = {name: value - before.get(name, 0.0) for name, value in world.run(updates).items()}

    def idle(names: Sequence[str]) -> float:
        return max(0.0, 1 - sum(spent[name] for name in names) / (len(names) * spent["seconds"]))

    return {
        "samples/s": spent["samples"] / spent["seconds"],
        "trained tokens/s": spent["trained"] / spent["seconds"],
        "learner idle": idle(["learner"]),
        "generators idle": max(0.0, 1 - spent["generating"] / spent["nodes"]),
        "most idle": max((idle([name]) for name in stayed.intersection(fleet.names)), default=math.nan),
        "rewards idle": idle(["rewards"]),
        "slots filled": spent["rows"] * deployment.generators.least / (spent["nodes"] * deployment.generators.slots),
        "lag": spent["lags"] / max(1, spent["trained"]),
        "worst lag": world.lag_max,
        "masked": 1 - spent["trained"] / spent["tokens"],
        "dropped": spent["dropped"] / spent["ended"],
        "generators": spent["nodes"] / spent["seconds"],
        "generator hours": spent["nodes"] / 3600,
        "lost": spent.get("lost", 0.0) / (spent.get("lost", 0.0) + spent["tokens"]),
    }


class World:
    """What the machines share: time, and `StoreCore` as it is, whose waits are tried again as in `ReplayStore`."""

    def __init__(self, recipe: Recipe, deployment: Deployment, costs: Costs, lengths: Lengths) -> None:
        self.recipe, self.deployment, self.costs, self._lengths = recipe, deployment, costs, lengths
        self.rng, self.now = random.Random(recipe.seed), 0.0
        self.rule = recipe.staleness_rule(deployment.generators.slots, deployment.generators.least)
        self.spent = defaultdict[str, float](float)  # seconds of work, by name, and what else adds up
        self.lag_max, self._scored_at = 0, 0.0
        self.fleet: SimulatedFleet | None = None
        self.newest = -1  # update of the weights that were delivered last
        self.learner = TimeInState("wait:store", lambda: self.now)
        # Of rollouts that are not trained yet: (update of the weights, tokens from them).
        self.spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._due: list[tuple[float, int, Process]] = []
        self._waiting: dict[Any, dict[Process, tuple[Sequence[str], Attempt]]] = {}  # by what for
        self._numbers = count()
        prompts = [Prompt(row=row, ids=(), data_source="") for row in range(self.rule.batch_groups)]
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=1, stop_token_ids=())
        plan = StorePlan(
            rule=self.rule,
            source=Source(prompts=prompts, sampling=sampling, shuffle=False),
            sampling=recipe.sampling,
            keep=lambda rewards: self.rng.random() >= costs.filtered_share,
            baseline=recipe.algorithm.wants_baseline,
            lease_s=math.inf,  # nobody is silent: of deaths the store is told
        )
        verbs = dict.fromkeys(("append_events", "sync", "truncate"), lambda *args: None)
        no_log = SimpleNamespace(**verbs, history=(), state=b"", events_closed=0, due=False)  # it is there for restarts
        self.core = StoreCore(plan, no_log, lambda: self.now, lambda: self.now)  # type: ignore[arg-type]

    def start(self, process: Process) -> None:
        heapq.heappush(self._due, (self.now, next(self._numbers), process))

    def run(self, updates: int) -> dict[str, float]:
        """Until so many are committed. What was spent by then."""
        context = self.core.context
        while self.core.ledger.committed < updates:
            self.now, _, process = heapq.heappop(self._due)
            self._resume(process)
            while context.stirred:
                stirred, context.stirred = context.stirred, {}
                for topic in stirred:
                    for waiting, wait in list(self._waiting.get(topic, {}).items()):
                        if not self.core.offers(topic):
                            break
                        self._try(waiting, *wait)
            context.write()
        counts = self.core.ledger.counts()
        nodes = self.fleet.node_seconds() if self.fleet is not None else 0.0
        return {
            **self.spent,
            "nodes": nodes,
            "seconds": self.now,
            "dropped": counts.evicted,
            "ended": counts.reserved - counts.pending,
        }

    def _resume(self, process: Process, answer: Any = None) -> None:
        with suppress(StopIteration):
            wait = process.send(answer)
            if isinstance(wait, tuple):
                self._try(process, *wait)
            else:
                heapq.heappush(self._due, (self.now + wait, next(self._numbers), process))

    def _try(self, process: Process, topics: Sequence[str], attempt: Attempt) -> None:
        done, answer = attempt()
        for topic in topics:
            waiting = self._waiting.setdefault(topic, {})
            if done:
                waiting.pop(process, None)
            else:
                waiting.setdefault(process, (topics, attempt))
        if done:
            self._resume(process, answer)

    def score_s(self, rollouts: int) -> float:
        """Until the verdicts on so many are there: all processes share them, after those that came before."""
        rewards = self.deployment.rewards
        seconds = rollouts * self.costs.score_s / (rewards.least * rewards.processes)
        self.spent["rewards"] += seconds
        self._scored_at = max(self._scored_at, self.now) + seconds
        return max(self.costs.score_s, self._scored_at - self.now)

    def stir(self, name: str) -> None:
        self.core.context.stir(name)

    def key(self, worker: str) -> Key:
        return Key(worker, 1, next(self._numbers), learner=1)

    def call(self, verb: str, worker: str, *args: Any) -> Any:
        return self.core.verbs[verb](self.key(worker), *args)

    def end(self, process: Process) -> None:
        """It waits for nothing any more."""
        for waiting in self._waiting.values():
            waiting.pop(process, None)
        process.close()

    def lengths(self, size: int) -> Sequence[int]:
        """Of a group's rollouts: those of a group that was given, or any of these."""
        group = self.rng.choice(self._lengths)
        return group if len(group) == size else self.rng.choices(group, k=size)


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
        """Submits rollouts; and has them scored, first come first served."""
        yield self._world.costs.call_s + SUBMIT_EVERY_S / 2
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


def lease(world: World, leased: list[BatchLease]) -> Process:
    """The learner's prefetching: the next batch, while one is trained."""
    ledger = world.core.ledger
    while True:
        batch = yield ("batch",), lambda: world.call("lease_batch", "learner", ledger.planned, 0.0).attempt()
        yield world.costs.call_s + world.costs.rows_s
        leased.append(batch)
        world.stir("learner")
        yield ("learner",), lambda: (not leased, None)


def learn(world: World, leased: list[BatchLease]) -> Process:
    """The learner: trains, commits, publishes."""
    costs, ranks = world.costs, world.deployment.learner.ranks
    world.call("fence", "learner", 0)
    for update in count():
        world.start(deliver(world, update))
        yield costs.publish_s
        world.learner.enter("wait:store")
        yield ("learner",), lambda: (bool(leased), None)
        world.learner.enter("busy")
        batch = leased.pop()
        world.stir("learner")
        seconds = costs.update_s + costs.token_s * book(world, batch, update) / ranks
        world.spent["learner"] += seconds + costs.publish_s
        yield seconds
        world.call("commit", "learner", batch.lease, Version(1, update + 1), {})
        world.call("checkpointed", "learner", update + 1)


def deliver(world: World, update: int) -> Process:
    """The weight bus."""
    yield world.costs.deliver_s
    world.newest = max(world.newest, update)
    for generator in world.fleet.all if world.fleet is not None else ():
        generator.swap(update)


def book(world: World, batch: BatchLease, committed: int) -> int:
    """Adds up a batch's tokens, by lag. How many there are."""
    rollouts = [(group, i) for group in batch.groups for i in range(world.recipe.sampling.n)]
    updates, tokens = np.array([span for rollout in rollouts for span in world.spans.pop(rollout)]).T
    trained = world.rule.trainable(updates, committed)
    lags = (committed - updates)[trained]
    kept = tokens[trained]
    for name, figure in {"samples": len(rollouts), "tokens": tokens.sum(), "trained": kept.sum(), "lags": lags @ kept}.items():
        world.spent[name] += float(figure)
    world.lag_max = max(world.lag_max, int(lags.max(initial=0)))
    return int(tokens.sum())
