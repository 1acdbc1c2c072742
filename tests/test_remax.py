"""A whole run of ReMax: each group has a greedy rollout that is compared with, logged, and never trained."""

from collections import defaultdict
from typing import Any

import pytest

from asyncrl import Trainer, launch
from asyncrl.config import AlgorithmSpec, LearnerSpec, SamplingSpec
from asyncrl.deployment import Deployment, EngineSpec, GeneratorsSpec
from asyncrl.errors import ConfigError
from asyncrl.replay import open as open_replay

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def test_a_run_with_baselines_and_its_resumption(local_ray, tiny_recipe, tmp_path):
    """The group of 4 + 1 fits the 5 slots exactly."""
    remax, learner = AlgorithmSpec(adv_estimator="remax"), LearnerSpec(batch_groups=4, lr=1e-2)
    recipe = tiny_recipe(algorithm=remax, learner=learner, total_steps=5)
    deployment = Deployment(generators=GeneratorsSpec(engine=EngineSpec(slots=5, max_length=40)))
    metrics: dict[int, dict[str, float]] = {}

    def watch(status: Any, tally: Any) -> None:
        metrics.update({r.version.update: r.metrics for r in (status.store.records if status.store else ())})

    with Trainer(recipe, deployment, runs_dir=tmp_path, observe=watch) as trainer:
        trainer.fit()
        result = trainer.finish()
    assert (result.steps, result.trained, result.samples) == (5, 20, 5 * 4 * 4)

    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in open_replay(result.run_dir).rollouts().to_pylist():
        if row["outcome"] == "trained":
            groups[row["trained_update"], row["group"]].append(row)
    earned = defaultdict(list)
    for (update, _), rows in groups.items():
        assert sorted((row["rollout"], row["baseline"]) for row in rows) == [*((i, False) for i in range(4)), (4, True)]
        earned[update] += [row["reward"] for row in rows if row["baseline"]]
        (greedy,) = (row for row in rows if row["baseline"])
        assert set(greedy["logprobs"]) == {0.0}  # a point mass
    for update, told in metrics.items():
        assert told["reward/baseline"] == pytest.approx(sum(earned[update]) / 4)
        assert told["training/rollouts"] == told["samples"] == 16
        assert told["staleness/lag_max"] <= 4

    with pytest.raises(ConfigError, match="baseline per group"):
        launch(tiny_recipe(total_steps=6), runs_dir=tmp_path, resume=True)
    more = tiny_recipe(algorithm=remax, learner=learner, total_steps=7)
    assert launch(more, deployment, runs_dir=tmp_path, resume=True).steps == 7


def test_single_rollouts_learn_from_their_baselines(local_ray, tiny_recipe, tmp_path):
    """n = 1, as in the paper."""
    recipe = tiny_recipe(
        algorithm=AlgorithmSpec(adv_estimator="remax"),
        sampling=SamplingSpec(n=1, min_valid=1, max_response_length=6),
        total_steps=3,
    )
    result = launch(recipe, runs_dir=tmp_path)
    assert (result.steps, result.samples) == (3, 12)
