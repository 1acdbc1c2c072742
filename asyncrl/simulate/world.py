"""What the machines of a simulated run share: its time, and the production store.

A machine is a process: a Python generator that yields what it waits for, seconds or an answer of the store. Those that are due
go on in order, and no time passes but from one to the next.
"""

import heapq
import math
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from itertools import count
from types import SimpleNamespace
from typing import Any

from asyncrl.config import Deployment, Recipe
from asyncrl.replay.core import StoreCore
from asyncrl.replay.plan import Source, StorePlan
from asyncrl.report.timing import TimeInState
from asyncrl.simulate.costs import Costs, Lengths
from asyncrl.types import Key, Prompt, Sampling

Attempt = Callable[[], tuple[bool, Any]]  # whether there is an answer, and the answer
Process = Generator[float | tuple[Sequence[str], Attempt], Any, None]  # seconds; or what an attempt waits for, as `Poll` has it


class World:
    """What the machines share: time, and `StoreCore` as it is, whose waits are tried again as in `ReplayStore`."""

    def __init__(self, recipe: Recipe, deployment: Deployment, costs: Costs, lengths: Lengths) -> None:
        self.recipe, self.deployment, self.costs, self._lengths = recipe, deployment, costs, lengths
        self.rng, self.now = random.Random(recipe.seed), 0.0
        self.rule = recipe.staleness_rule(deployment.generators.slots, deployment.generators.least)
        self.spent = defaultdict[str, float](float)  # seconds of work, by name, and what else adds up
        self.lag_max, self._scored_at = 0, 0.0
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
        verbs = dict.fromkeys(("append_events", "sync", "truncate", "trim"), lambda *args: None)
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
        return {
            **self.spent,
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
