"""Runs whose learner is several ranks."""

import json

import pytest

from asyncrl import launch
from asyncrl.cli import main
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LearnerSpec, LimitsSpec, RanksSpec, StalenessSpec

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
