"""A run in simulated time: the production store, and machines that do what theirs do, for as long as the `Costs` say."""

import math
from collections.abc import Sequence
from itertools import count

import numpy as np

from asyncrl.config import Deployment, Recipe
from asyncrl.simulate.costs import Costs, Lengths
from asyncrl.simulate.elastic import SimulatedFleet, Trace
from asyncrl.simulate.world import Process, World
from asyncrl.types import BatchLease, Version

_SKIPPED = 5  # the first fifth of the updates is left out: until all is under way


def simulate(
    recipe: Recipe, deployment: Deployment, costs: Costs, lengths: Lengths, updates: int, trace: Trace | None = None
) -> dict[str, float]:
    """Figures of so many updates, their start left out: rollouts in batches, and their tokens that were not masked, per second;
    shares of the time in which somebody had nothing to do; share of the slots that were decoded; lag of trained tokens; share
    of the tokens in batches that were masked, and of the groups that were evicted; generators that there were, and their hours;
    share of the tokens that were lost with a generator. trace: of the nodes that there are; None: as many as are
    wanted. Raises ConfigError where a run would, because nothing is left to train."""
    world = World(recipe, deployment, costs, lengths)
    fleet = SimulatedFleet(world, trace)
    leased: list[BatchLease] = []
    for process in (learn(world, leased, fleet), lease(world, leased)):
        world.start(process)
    before = world.run(updates // _SKIPPED)
    held_before, stayed = fleet.node_seconds(), {*fleet.names}
    spent = {name: value - before.get(name, 0.0) for name, value in world.run(updates).items()}
    nodes = fleet.node_seconds() - held_before  # in seconds

    def idle(names: Sequence[str]) -> float:
        return max(0.0, 1 - sum(spent[name] for name in names) / (len(names) * spent["seconds"]))

    return {
        "samples/s": spent["samples"] / spent["seconds"],
        "trained tokens/s": spent["trained"] / spent["seconds"],
        "learner idle": idle(["learner"]),
        "generators idle": max(0.0, 1 - spent["generating"] / nodes),
        "most idle": max((idle([name]) for name in stayed.intersection(fleet.names)), default=math.nan),
        "rewards idle": idle(["rewards"]),
        "slots filled": spent["rows"] * deployment.generators.least / (nodes * deployment.generators.slots),
        "lag": spent["lags"] / max(1, spent["trained"]),
        "worst lag": world.lag_max,
        "masked": 1 - spent["trained"] / spent["tokens"],
        "dropped": spent["dropped"] / spent["ended"],
        "generators": nodes / spent["seconds"],
        "generator hours": nodes / 3600,
        "lost": spent.get("lost", 0.0) / (spent.get("lost", 0.0) + spent["tokens"]),
    }


def lease(world: World, leased: list[BatchLease]) -> Process:
    """The learner's prefetching: the next batch, while one is trained."""
    ledger = world.core.ledger
    while True:
        batch = yield ("batch",), lambda: world.call("lease_batch", "learner", ledger.planned, 0.0).attempt()
        yield world.costs.call_s + world.costs.rows_s
        leased.append(batch)
        world.stir("learner")
        yield ("learner",), lambda: (not leased, None)


def learn(world: World, leased: list[BatchLease], fleet: SimulatedFleet) -> Process:
    """The learner: trains, commits, publishes."""
    costs, ranks = world.costs, world.deployment.learner.ranks
    world.call("fence", "learner", 0)
    for update in count():
        world.start(deliver(world, update, fleet))
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


def deliver(world: World, update: int, fleet: SimulatedFleet) -> Process:
    """The weight bus."""
    yield world.costs.deliver_s
    world.newest = max(world.newest, update)
    for generator in fleet.all:
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
