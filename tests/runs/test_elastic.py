"""Generators and reward workers come and go while a run goes on; nodes are drained and lost: the log shows what it came to."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from asyncrl import RunResult, Trainer
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LearnerSpec, LimitsSpec, SamplingSpec
from asyncrl.errors import ConfigError
from asyncrl.replay import open as open_replay
from asyncrl.replay.log import events as ev
from asyncrl.report.summary import RunSummary

pytestmark = pytest.mark.ray


class Seen:
    """The generators and reward workers that are up, and the most and fewest of them so far."""

    def __init__(self) -> None:
        self.run = RunSummary(name="", total_steps=0)

    def __call__(self, run: RunSummary) -> None:
        self.run = run

    def up(self, role: str) -> set[str]:
        return {name for name in self.run.pids if name.startswith(role)}


def deployment(**limits: float) -> Deployment:
    engine = EngineSpec(slots=8, max_length=40)
    return Deployment(generators=GeneratorsSpec(engine=engine), limits=LimitsSpec(poll_s=0.5, **limits))


@pytest.mark.timeout(400)
def test_generators_and_rewards_come_and_go_while_the_run_goes_on(
    local_ray, tiny_recipe, events_of, assert_nothing_lost, metrics_of, tmp_path
):
    recipe = tiny_recipe(
        total_steps=10_000, learner=LearnerSpec(batch_groups=4, lr=1e-4), sampling=SamplingSpec(n=4, max_response_length=24)
    )
    seen = Seen()
    with Trainer(recipe, deployment(), runs_dir=tmp_path, observe=seen) as trainer:

        def fit_until(generators: set[str], rewards: set[str]) -> None:
            while (seen.up("generator"), seen.up("reward")) != (generators, rewards):
                trainer.fit(5)

        trainer.fit(3)
        for refused in ({"generators": 0}, {"rewards": -1}):
            with pytest.raises(ConfigError, match=r"scale: (generators=0|rewards=-1) < 1: nobody would be left"):
                trainer.scale(**refused)
        asking = threading.Thread(target=trainer.scale, kwargs={"generators": 3, "rewards": 2})
        asking.start()
        fit_until({"generator-0", "generator-1", "generator-2"}, {"reward-0", "reward-1"})
        asking.join()
        assert trainer._supervisor._plan.staleness.most_outstanding == 4 * 4, "auto follows the slots of three engines"
        trainer.fit(6)
        trainer.scale(generators=1, rewards=1)
        fit_until({"generator-0"}, {"reward-0"})
        assert not {"generator-1", "generator-2", "reward-1"} & seen.run.reports.keys()
        trainer.scale(generators=2)
        fit_until({"generator-0", "generator-1"}, {"reward-0"})
        trainer.fit(5)
        result = trainer.finish()
    events = events_of(result.run_dir)
    assert_nothing_lost(events, result)
    assert (result.restarts, result.preemptions) == ({}, {})
    assert result.max_trained_lag <= recipe.staleness.max_lag
    workers = {(row["worker"]) for row in open_replay(result.run_dir).rollouts(["worker"]).to_pylist()}
    assert workers == {"generator-0", "generator-1", "generator-2"}
    assert not [event for event in events if isinstance(event, ev.HolderDied | ev.GroupReissued)], "they finish what they hold"
    lives = {event.incarnation for event in events if isinstance(event, ev.GroupReserved) and event.worker == "generator-1"}
    assert len(lives) == 2, "who gets a name again has another incarnation"
    told = [(line["role"], line["count_before"], line["count"]) for line in metrics_of(result.run_dir, "scale")]
    assert sorted(told[:2]) == [("generator", 1, 3), ("reward", 1, 2)]
    assert sorted(told[2:4]) == [("generator", 3, 1), ("reward", 2, 1)]
    assert told[4:] == [("generator", 1, 2)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_generators_outlive_nodes_that_drain_and_nodes_that_are_killed(tiny_recipe, events_of, assert_nothing_lost, tmp_path):
    """Two of them on one node: it drains, and they begin on another; that is killed without a word, and they begin on a third.
    `max_restarts=0`: any failure would end the run."""
    recipe = tiny_recipe(total_steps=10_000, learner=LearnerSpec(batch_groups=4, lr=1e-4))
    path = tmp_path / "recipe.json"
    path.write_bytes(msgspec.json.encode(recipe))
    command = [sys.executable, str(Path(__file__).with_name("lost_nodes.py")), str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    result = msgspec.convert(told["result"], RunResult)
    assert result.restarts == {}
    assert sum(result.preemptions.values()) == 4
    (first,), (second,), (third,) = told["nodes"]
    assert [first, second] == told["spot"]
    assert third not in told["spot"]
    events = events_of(result.run_dir)
    assert_nothing_lost(events, result)
    assert result.max_trained_lag <= recipe.staleness.max_lag
    assert not any(isinstance(event, ev.HolderDied) for event in events), "no prompt is to blame for a node"
