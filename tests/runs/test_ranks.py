"""Runs whose learner is several ranks."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

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


def test_two_ranks_make_the_run_of_one_and_are_replayed_to_the_bit(local_ray, tiny_recipe, metrics_of, tmp_path, capsys):
    recipe = tiny_recipe(
        staleness=StalenessSpec(max_lag=0), learner=LearnerSpec(batch_groups=4, lr=1e-2, max_tokens_per_pack=32)
    )
    runs = [launch(recipe, deployment(ranks), name=f"on-{ranks}", runs_dir=tmp_path) for ranks in (1, 2)]
    one, two = (metrics_of(run.run_dir, "step") for run in runs)
    assert [run.steps for run in runs] == [5, 5]
    for name in ("reward/mean", "actor/pg_loss", "actor/entropy", "actor/grad_norm", "response_length/mean"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4, abs=1e-6), name
    assert max(line["gap/logprob_max_abs"] for line in two) < 5e-5
    told = metrics_of(runs[1].run_dir, "actors")[-1]
    assert min(told[f"{rank}/busy_s"] for rank in ("learner", "learner-1")) > 0
    capsys.readouterr()
    assert main(["replay", runs[1].run_dir]) == 0
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
    local_ray, tiny_recipe, events_of, assert_nothing_lost, metrics_of, tmp_path
):
    learner = LearnerSpec(batch_groups=4, lr=1e-2, max_tokens_per_pack=32)
    recipe = tiny_recipe(staleness=StalenessSpec(max_lag=0), learner=learner, total_steps=10)
    alone = launch(recipe, deployment(1), name="alone", runs_dir=tmp_path)
    held, gate = tmp_path / "held.py", tmp_path / "released-"
    held.write_text(HELD_REWARD.format(gate=str(gate)))
    recipe = replace(recipe, reward=RewardSpec(function=f"{held}:compute_score", deadline_s=200))
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
    one, changed = (metrics_of(run.run_dir, "step") for run in (alone, result))
    for name in ("reward/mean", "actor/pg_loss", "actor/entropy", "actor/grad_norm", "response_length/mean"):
        assert [line[name] for line in changed] == pytest.approx([line[name] for line in one], rel=1e-4, abs=1e-6), name
    assert "learner-1/busy_s" not in metrics_of(result.run_dir, "actors")[-1]
