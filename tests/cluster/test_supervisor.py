"""What the supervisor does when an actor cannot go on; recovery from a kill is in tests/runs/test_recovery.py."""

import json
import logging

import pytest

from asyncrl import launch
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.supervisor import Supervisor
from asyncrl.config import Deployment, GeneratorsSpec, LimitsSpec, PlaceSpec, RewardSpec
from asyncrl.errors import AsyncRLError, ConfigError, PlacementError
from asyncrl.report.summary import RunSummary
from asyncrl.types import GroupCounts, StoreReport

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def test_a_prompt_that_was_given_up_is_named_once(local_ray, tiny_recipe, tmp_path, caplog):
    plan = RunPlan(recipe=tiny_recipe(), deployment=Deployment(), run_dir=str(tmp_path), started=1, loopback=True)
    supervisor = Supervisor(plan, RunSummary(name="tiny", total_steps=5), lambda records: None)
    for said in ((), ("the prompt in row 7",), ("the prompt in row 7",), ("the prompt in row 7", "the prompt in row 9")):
        report = StoreReport(
            records=(), committed=0, counts=GroupCounts(), evals_pending=0, activity=0, gauges={}, given_up=said
        )
        supervisor._store.poll_report = lambda timeout_s, report=report: report
        supervisor._tick()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["the prompt in row 7", "the prompt in row 9"]


def test_nothing_moving_ends_the_run_with_a_dump(local_ray, tiny_recipe, tmp_path):
    stuck = tmp_path / "stuck.py"
    stuck.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    while True: pass\n")
    recipe = tiny_recipe(reward=RewardSpec(function=f"{stuck}:compute_score", deadline_s=600.0))
    with pytest.raises(AsyncRLError, match=r"nothing has moved for limits.stall_timeout_s=5 s"):
        launch(recipe, Deployment(limits=LimitsSpec(stall_timeout_s=5.0, poll_s=0.5)), runs_dir=tmp_path)
    dump = json.loads((tmp_path / "tiny" / "logs" / "stall.json").read_text())
    assert dump.keys() == {"store", "learner", "generator-0", "reward-0"}
    assert "in fetch" in dump["learner"], "the stack shows what the learner waits in: its next batch"
    assert "worker.py" in dump["reward-0"]


def test_an_error_that_would_come_again_is_not_retried(local_ray, tiny_recipe, tmp_path):
    missing = tmp_path / "raises.py"
    missing.write_text("def compute_score(*arguments): return 0.0\n\nraise RuntimeError('licence expired')\n")
    recipe = tiny_recipe(reward=RewardSpec(function=f"{missing}:compute_score"))
    with pytest.raises(ConfigError, match=r"reward-0: (.|\n)*licence expired"):
        launch(recipe, runs_dir=tmp_path)
    assert "licence expired" in (tmp_path / "tiny" / "logs" / "reward-0.error").read_text()


def test_a_generator_that_fits_nowhere_is_named(local_ray, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "a cluster, so that only joining it can tell")
    deployment = Deployment(generators=GeneratorsSpec(place=PlaceSpec(cpus=512)))
    with pytest.raises(PlacementError, match="generator-0 fits nowhere"):
        launch(tiny_recipe(), deployment, runs_dir=tmp_path)
