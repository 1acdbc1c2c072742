"""Generators and reward workers come and go while a run goes on; nodes are drained and lost: the log shows what it came to."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from asyncrl import RunResult, Trainer
from asyncrl.cli import main
from asyncrl.config import (
    AlgorithmSpec,
    CountRange,
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    LimitsSpec,
    SamplingSpec,
)
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


WAITING = """
import functools, os, time

import torch
from transformers import AutoModelForCausalLM

def model(spec):
    \"\"\"Its steps take as long as on a busy device, while the learner is fast.\"\"\"
    made = AutoModelForCausalLM.from_pretrained(spec.path, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa")
    forward = made.forward

    @functools.wraps(forward)
    def stepped(*arguments, **named):
        if named.get("past_key_values") is not None and not os.path.exists({slow!r}):
            time.sleep(0.05)
        return forward(*arguments, **named)

    made.forward = stepped
    return made

def loss(logp_t, old_t, advantages_t, sequence_t):
    if os.path.exists({slow!r}):
        time.sleep(1.0)
    return -(logp_t - old_t).exp() * advantages_t, {{}}
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_takes_generators_as_it_needs_them_and_gives_them_up(
    local_ray, tiny_recipe, events_of, assert_nothing_lost, metrics_of, tmp_path
):
    """One generator of up to three, for which the learner waits; then the learner is slow."""
    module, slow, seen = tmp_path / "waiting.py", tmp_path / "slow", Seen()
    module.write_text(WAITING.format(slow=str(slow)))
    recipe = tiny_recipe(
        total_steps=10_000,
        learner=LearnerSpec(batch_groups=4, lr=1e-4),
        sampling=SamplingSpec(n=4, max_response_length=24),
        algorithm=AlgorithmSpec(policy_loss=f"{module}:loss"),
    )
    recipe = replace(recipe, model=replace(recipe.model, builder=f"{module}:model"))
    elastic = GeneratorsSpec(count=CountRange(min=1, max=3), engine=EngineSpec(slots=8, max_length=40))
    limits = LimitsSpec(poll_s=0.5, scale_every_s=2.0)
    with Trainer(
        recipe, Deployment(generators=elastic, limits=limits), runs_dir=tmp_path, observe=seen, progress=False
    ) as trainer:
        while len(seen.up("generator")) < 2:
            trainer.fit(3)
        slow.touch()
        while not any(scaling.count < scaling.count_before for scaling in seen.run.scalings):
            trainer.fit(3)
        slow.unlink()
        result = trainer.finish()
    told = metrics_of(result.run_dir, "scale")
    ups = [line for line in told if line["count"] > line["count_before"]]
    assert (told[0]["count_before"], told[0]["count"]) == (1, 2)
    assert ups
    assert all(line["reason"].startswith("the learner waited for ") for line in ups)
    assert told[-1]["reason"].startswith("held back for ")
    assert main(["report", result.run_dir, "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    for line in told:
        assert f"{line['count']} generator actors instead of {line['count_before']}: {line['reason']}" in page
    assert_nothing_lost(events_of(result.run_dir), result)
    assert (result.restarts, result.preemptions) == ({}, {})
    assert result.max_trained_lag <= recipe.staleness.max_lag


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_generators_and_ranks_outlive_nodes_that_drain_and_nodes_that_are_killed(
    tiny_recipe, events_of, assert_nothing_lost, tmp_path
):
    """Two generators and one of two ranks on one node: it drains, and they begin on another; that is killed without a word, and
    they begin on a third. The learner may be what a node dies of, so that counts: once, whether or not its next one is placed
    on the dead node first."""
    recipe = tiny_recipe(total_steps=10_000, learner=LearnerSpec(batch_groups=4, lr=1e-4))
    path = tmp_path / "recipe.json"
    path.write_bytes(msgspec.json.encode(recipe))
    command = [sys.executable, str(Path(__file__).with_name("lost_nodes.py")), str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    result = msgspec.convert(told["result"], RunResult)
    assert result.restarts == {"learner": 1}
    assert result.preemptions.pop("learner") in (1, 2)
    assert sum(result.preemptions.values()) == 4
    (first,), (second,), (third,) = told["nodes"]
    assert [first, second] == told["spot"]
    assert third not in told["spot"]
    events = events_of(result.run_dir)
    assert_nothing_lost(events, result)
    assert result.max_trained_lag <= recipe.staleness.max_lag
    assert not any(isinstance(event, ev.HolderDied) for event in events), "no prompt is to blame for a node"
