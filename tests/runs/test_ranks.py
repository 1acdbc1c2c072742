"""Runs whose learner is several ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncrl import Trainer, launch
from asyncrl.cli import main
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LearnerSpec, LimitsSpec, RanksSpec, RewardSpec, StalenessSpec
from asyncrl.errors import ConfigError
from asyncrl.replay.log import events as ev
from asyncrl.report.summary import RunSummary

pytestmark = pytest.mark.ray


def deployment(ranks: int, **limits: float) -> Deployment:
    return Deployment(
        learner=RanksSpec(ranks=ranks),
        generators=GeneratorsSpec(engine=EngineSpec(deterministic=True)),
        limits=LimitsSpec(poll_s=0.5, **limits),
    )


SETTINGS: dict[str, Any] = {
    "staleness": StalenessSpec(max_lag=0),
    "learner": LearnerSpec(batch_groups=4, lr=1e-2, max_tokens_per_pack=32),
}


@pytest.fixture(scope="module")
def alone(local_ray, tiny_recipe_in, metrics_of, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of ten updates on one rank says."""
    folder = tmp_path_factory.mktemp("alone")
    return metrics_of(
        launch(tiny_recipe_in(folder, total_steps=10, **SETTINGS), deployment(1), runs_dir=folder).run_dir, "step"
    )


def assert_same(lines: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    for name in ("reward/mean", "actor/pg_loss", "actor/entropy", "actor/grad_norm", "response_length/mean"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in alone], rel=1e-4, abs=1e-6), name


def test_two_ranks_make_the_run_of_one_and_are_replayed_to_the_bit(local_ray, alone, tiny_recipe, metrics_of, tmp_path, capsys):
    two = launch(tiny_recipe(**SETTINGS), deployment(2), runs_dir=tmp_path)
    lines = metrics_of(two.run_dir, "step")
    assert two.steps == 5
    assert_same(lines, alone[:5])
    assert max(line["gap/logprob_max_abs"] for line in lines) < 5e-5
    told = metrics_of(two.run_dir, "actors")[-1]
    assert min(told[f"{rank}/busy_s"] for rank in ("learner", "learner-1")) > 0
    capsys.readouterr()
    assert main(["replay", two.run_dir]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert (replayed["ranks"], replayed["begin"], replayed["checkpoints"]) == (2, 3, [5])


# What `conftest.REWARD` gives; but half of the samples of the fourth update, and of the eighth, wait for a file.
HELD_REWARD = """
import itertools, os, time

samples = itertools.count(1)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    deadline, sample = time.monotonic() + 120, next(samples)
    for update in (3, 7):
        while sample > 16 * update + 8 and not os.path.exists({gate!r} + str(update)) and time.monotonic() < deadline:
            time.sleep(0.01)
    return solution_str.count(ground_truth) / 6
"""


def test_ranks_come_and_go_between_two_updates_of_a_run_that_stays_the_same(
    local_ray, alone, tiny_recipe, events_of, assert_nothing_lost, metrics_of, tmp_path
):
    held, gate = tmp_path / "held.py", tmp_path / "released-"
    held.write_text(HELD_REWARD.format(gate=str(gate)))
    reward = RewardSpec(function=f"{held}:compute_score", deadline_s=200)
    recipe = tiny_recipe(**SETTINGS, reward=reward, total_steps=10)
    asked: list[int] = []

    def change(run: RunSummary) -> None:
        for update, ranks in ((3, 2), (7, 1)):
            if update not in asked and run.committed == update:
                asked.append(update)
                trainer.scale(learner=ranks)
            elif update in asked and ("learner-1" in run.pids) == (ranks == 2):
                Path(f"{gate}{update}").touch()

    with Trainer(recipe, deployment(1), name="changed", runs_dir=tmp_path, observe=change) as trainer:
        with pytest.raises(ConfigError, match="ranks=0 < 1"):
            trainer.scale(learner=0)
        trainer.fit()
        result = trainer.finish()
    assert_nothing_lost(events_of(result.run_dir), result)
    assert (result.steps, result.restarts, result.preemptions) == (10, {}, {})
    scalings = metrics_of(result.run_dir, "scale")
    assert [(line["step"], line["count_before"], line["count"]) for line in scalings] == [(3, 1, 2), (7, 2, 1)]
    fences = [event.committed for event in events_of(result.run_dir) if isinstance(event, ev.LearnerFenced)]
    assert fences == [0, 3, 7], "each began where the one before had halted"
    assert_same(metrics_of(result.run_dir, "step"), alone)
    assert "learner-1/busy_s" not in metrics_of(result.run_dir, "actors")[-1]
