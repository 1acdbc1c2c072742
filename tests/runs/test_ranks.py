"""Runs whose learner is several ranks."""

import json

import pytest

from asyncrl import Trainer, launch
from asyncrl.cli import main
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LearnerSpec, LimitsSpec, RanksSpec, StalenessSpec
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


def test_ranks_come_and_go_between_two_updates_of_a_run_that_stays_the_same(
    local_ray, tiny_recipe, events_of, assert_nothing_lost, metrics_of, tmp_path
):
    recipe = tiny_recipe(
        staleness=StalenessSpec(max_lag=0), learner=LearnerSpec(batch_groups=4, lr=1e-2, max_tokens_per_pack=32), total_steps=12
    )
    alone = launch(recipe, deployment(1), name="alone", runs_dir=tmp_path)
    asked: list[int] = []

    def ask(run: RunSummary) -> None:
        for ranks, at in ((2, 2), (1, 7)):
            if ranks not in asked and run.committed >= at and (ranks == 2 or "learner-1" in run.pids):
                asked.append(ranks)
                trainer.scale(learner=ranks)

    with Trainer(recipe, deployment(1), name="changed", runs_dir=tmp_path, observe=ask) as trainer:
        with pytest.raises(ConfigError, match="ranks=0 < 1"):
            trainer.scale(learner=0)
        trainer.fit()
        result = trainer.finish()
    assert_nothing_lost(events_of(result.run_dir), result)
    assert (result.steps, result.restarts, result.preemptions) == (12, {}, {})
    scalings = metrics_of(result.run_dir, "scale")
    assert [(line["role"], line["count_before"], line["count"]) for line in scalings] == [("learner", 1, 2), ("learner", 2, 1)]
    first, second = (line["step"] for line in scalings)
    assert 2 <= first < second < 12
    began, *others = [event.committed for event in events_of(result.run_dir) if isinstance(event, ev.LearnerFenced)]
    assert began == 0
    assert len(others) == 2
    assert first <= others[0] <= second <= others[1] < 12, "each began where the one before had halted"
    one, changed = (metrics_of(run.run_dir, "step") for run in (alone, result))
    for name in ("reward/mean", "actor/pg_loss", "actor/entropy", "actor/grad_norm", "response_length/mean"):
        assert [line[name] for line in changed] == pytest.approx([line[name] for line in one], rel=1e-4, abs=1e-6), name
    told = metrics_of(result.run_dir, "actors")
    assert any("learner-1/busy_s" in line for line in told)
    assert "learner-1/busy_s" not in told[-1]
