"""Whole runs under random delays, filtering and failures: the log proves that the bound held for every trained token."""

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from msgspec.structs import replace

from asyncrl import Trainer
from asyncrl.api import RunResult
from asyncrl.config import (
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    LimitsSpec,
    Recipe,
    RewardSpec,
    RewardsSpec,
    SamplingSpec,
    StalenessSpec,
)
from asyncrl.replay import open as open_replay
from asyncrl.replay.log import events as ev
from asyncrl.report.summary import RunSummary
from asyncrl.types import Report

pytestmark = pytest.mark.ray

# Takes up to 20 ms for most samples and 200 ms for some, raises for three in ten; the answer alone decides. Its verdict is
# noise, so that the policy never learns to make all rewards equal, which `keep` would filter for ever.
SLOW_REWARD = """
import random, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    rng = random.Random(solution_str)
    time.sleep(0.2 if rng.random() < 0.05 else 0.02 * rng.random())
    if rng.random() < 0.3:
        raise ValueError("unlucky")
    return float(rng.random() < 0.5)
"""


def slow_reward_in(folder: Path) -> RewardSpec:
    path = folder / "slow.py"
    path.write_text(SLOW_REWARD)
    return RewardSpec(function=f"{path}:compute_score")


@pytest.fixture
def slow_reward(tmp_path: Path) -> RewardSpec:
    return slow_reward_in(tmp_path)


def deployment(generators: int = 2, **engine: Any) -> Deployment:
    return Deployment(
        generators=GeneratorsSpec(count=generators, engine=EngineSpec(slots=16, max_length=40, **engine)),
        rewards=RewardsSpec(processes=3, lease_size=8),
        limits=LimitsSpec(poll_s=0.5),
    )


class Watcher:
    """Keeps the metrics of every update; `also` is called at every tick."""

    def __init__(self, also: Callable[[RunSummary], None] = lambda run: None) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self._also = also

    def __call__(self, run: RunSummary) -> None:
        self.metrics |= {update: record.metrics for update, record in run.steps.items()}
        self._also(run)


def run(
    recipe: Recipe, where: Deployment, tmp_path: Path, watcher: Watcher
) -> tuple[RunResult, list[Any], list[dict[str, Any]]]:
    """The result, every event, and every rollout that counts."""
    with Trainer(recipe, where, runs_dir=tmp_path, observe=watcher) as trainer:
        trainer.fit()
        result = trainer.finish()
    log = open_replay(result.run_dir)
    events = [ev.decode(payload) for payload in log.events().column("payload").to_pylist()]
    return result, events, log.rollouts().to_pylist()


def assert_every_group_ended_once(result: RunResult, events: list[Any]) -> None:
    reserved = [e.group for e in events if isinstance(e, ev.GroupReserved) and e.purpose == "train"]
    ends = Counter(e.group for e in events if isinstance(e, ev.GroupSettled))
    ends.update(group for e in events if isinstance(e, ev.BatchCommitted) for group in e.groups)
    (end,) = [i for i, e in enumerate(events) if isinstance(e, ev.Ended)]
    assert not any(isinstance(e, ev.GroupReserved | ev.GroupSettled | ev.BatchCommitted) for e in events[end:])
    unused = set(reserved) - set(ends)
    assert set(ends) <= set(reserved)
    assert set(ends.values()) == {1}
    settled = Counter(e.outcome for e in events if isinstance(e, ev.GroupSettled))
    assert result.pending == 0
    assert result.filtered == settled["filtered"]
    assert result.failed == settled["failed"]
    assert result.evicted == settled["evicted"]
    assert result.unused == len(unused)
    assert len(reserved) == result.trained + result.filtered + result.evicted + result.failed + result.unused


def assert_bound(recipe: Recipe, rollouts: list[dict[str, Any]], metrics: dict[int, dict[str, float]]) -> None:
    """The mask computed from the logged spans is, token for token in number and lag, what the learner says it trained."""
    rule, lags, policy = recipe.staleness_rule(), {u: Counter() for u in metrics}, Counter()  # type: ignore[var-annotated]
    for row in rollouts:
        if row["outcome"] != "trained" or row["status"] != "ok":
            continue
        update = row["trained_update"]
        updates = np.repeat(row["span_updates"], row["span_lengths"])
        mask = np.array(row["loss_mask"], dtype=bool)
        assert len(updates) == len(mask) == len(row["response_ids"])
        lag = update - 1 - updates
        assert lag.min() >= 0, "a token from weights that did not exist yet"
        trained = mask & rule.trainable(updates, update - 1)
        if rule.holds or rule.drops:
            assert trained.all(), "only `mask` masks"
        assert ((lag[trained] >= 0) & (lag[trained] <= rule.max_lag)).all()
        lags[update].update(lag[trained].tolist())
        policy[update] += int(mask.sum())
    for update, told in metrics.items():
        count = lags[update].total()
        assert told["tokens/policy"] == policy[update]
        assert told["tokens/trained"] == count
        assert told["staleness/lag_max"] == max(lags[update]) <= rule.max_lag
        assert {lag: told[f"staleness/lag_{lag}"] for lag in lags[update]} == {
            lag: pytest.approx(number / count) for lag, number in lags[update].items()
        }


@pytest.mark.parametrize(
    ("max_lag", "on_stale", "update_mode"),
    [(0, "hold", "in_flight"), (1, "drop", "drain")],
)
def test_no_trained_token_exceeds_the_bound(local_ray, tiny_recipe, slow_reward, tmp_path, max_lag, on_stale, update_mode):
    """An epoch of 64 prompts. update_mode `drain` swaps late: not before every answer under way is complete."""
    recipe = tiny_recipe(
        data=replace(tiny_recipe().data, epochs=1),
        reward=slow_reward,
        sampling=SamplingSpec(n=4, max_response_length=24, min_valid=3, max_attempts=2, keep="varied"),
        staleness=StalenessSpec(max_lag=max_lag, on_stale=on_stale),
        learner=LearnerSpec(batch_groups=4, lr=1e-4),
        total_steps=1000,
        seed=max_lag,
    )
    watcher = Watcher()
    result, events, rollouts = run(recipe, deployment(update_mode=update_mode), tmp_path, watcher)
    assert sorted(watcher.metrics) == list(range(1, result.steps + 1))
    assert min(result.filtered, result.failed) > 0, "the delays and failures under test did not happen"
    assert {row["worker"] for row in rollouts} <= {"generator-0", "generator-1"}
    assert_every_group_ended_once(result, events)
    assert_bound(recipe, rollouts, watcher.metrics)
    assert result.max_trained_lag <= max_lag
    assert result.restarts == {}
    # The end of the data is a clean end: every prompt was drawn, and what is left over makes a last, smaller batch.
    assert [e.position for e in events if isinstance(e, ev.GroupReserved) and e.retry == 0] == list(range(64))
    sizes = [len(e.groups) for e in events if isinstance(e, ev.BatchCommitted)]
    assert sizes[:-1] == [4] * (result.steps - 1)
    assert result.steps == math.ceil(result.trained / 4)


@pytest.fixture(scope="module")
def at_rest(local_ray, tiny_recipe_in, tmp_path_factory):
    """A run at learning rate zero: its watcher, and two reports of every actor, some seconds apart, between two looks each."""
    folder, taken = tmp_path_factory.mktemp("at-rest"), []
    recipe = tiny_recipe_in(
        folder,
        reward=slow_reward_in(folder),
        learner=LearnerSpec(batch_groups=4, lr=0.0),
        sampling=SamplingSpec(n=4, max_response_length=24),
        total_steps=1000,
    )

    def ask() -> dict[str, tuple[float, Report, float]]:
        answers = {}
        for member in trainer._supervisor._members:
            if member.role != "store":
                before = time.monotonic()
                answers[member.name] = (before, ray.get(member.handle.report.remote(), timeout=30), time.monotonic())
        return answers

    def watch(run: RunSummary) -> None:
        up = len(run.pids) == 5  # only then can each be asked
        if (not taken and run.committed >= 1 and up) or (len(taken) == 1 and len(watcher.metrics) >= 20):
            taken.append(ask())

    watcher = Watcher(watch)
    with Trainer(recipe, deployment(), runs_dir=folder, observe=watcher) as trainer:
        while len(taken) < 2:
            trainer.fit(20)
    return watcher, taken


def test_at_learning_rate_zero_the_learner_agrees_with_the_generators(at_rest):
    watcher, _ = at_rest
    assert len(watcher.metrics) >= 20
    assert watcher.metrics[1]["gap/logprob_max_abs"] >= 0  # the first batch is of lag 0: it is measured
    for told in watcher.metrics.values():
        assert told.get("gap/logprob_max_abs", 0.0) < 1e-5  # tokens of lag 0, if there are any
        assert abs(told["gap/k3"]) < 1e-9  # all tokens: every version holds the same weights


def test_every_actor_divides_its_wall_clock_into_states(at_rest):
    _, (first, second) = at_rest
    assert first.keys() == {"generator-0", "generator-1", "reward-0", "learner"}
    for name, (before, report, after) in second.items():
        earlier_before, earlier, earlier_after = first[name]
        passed = sum(report.seconds.values()) - sum(earlier.seconds.values())
        assert 0.98 * (before - earlier_after) <= passed <= 1.02 * (after - earlier_before), (name, report.seconds)
        assert all(state in ("busy", "sync") or state.startswith("wait:") for state in report.seconds)
