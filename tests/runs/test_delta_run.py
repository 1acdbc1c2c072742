"""A whole run whose weights travel as deltas: to the bit what it is with whole ones."""

from pathlib import Path

import pytest

from asyncrl import launch
from asyncrl.config import BusSpec, Deployment, EngineSpec, GeneratorsSpec, LearnerSpec, StalenessSpec
from asyncrl.replay import open as open_replay

ENGINE = EngineSpec(slots=8, max_length=32, deterministic=True)


@pytest.mark.ray
def test_a_run_over_deltas_equals_one_over_whole_versions(
    local_ray, tiny_recipe, tmp_path: Path, metrics_of, assert_nothing_lost, events_of
) -> None:
    """lr is so small that most of the float32 weights stay: else no delta would pay."""
    recipe = tiny_recipe(staleness=StalenessSpec(max_lag=0), learner=LearnerSpec(batch_groups=4, lr=4e-9), seed=3)
    made = {}
    for codec in ("full", "delta"):
        bus = BusSpec(transport="tcp", bucket_bytes=4096, codec=codec)
        result = launch(recipe, Deployment(generators=GeneratorsSpec(engine=ENGINE), bus=bus), runs_dir=tmp_path / codec)
        assert_nothing_lost(events_of(result.run_dir), result)
        rows = [row for row in open_replay(result.run_dir).rollouts().to_pylist() if row["outcome"] == "trained"]
        answers = sorted((row["group"], row["rollout"], row["response_ids"], row["logprobs"], row["reward"]) for row in rows)
        lines = metrics_of(result.run_dir, "step")
        assert max(line["gap/logprob_max_abs"] for line in lines) <= 1e-5
        steps = [(line["actor/pg_loss"], line["actor/grad_norm"], line["reward/mean"]) for line in lines]
        gauges = [line for line in metrics_of(result.run_dir, "actors") if "generator-0/bus/versions" in line][-1]
        assert gauges["generator-0/bus/bad_transfers"] == 0
        assert (gauges["generator-0/bus/delta_versions"] > 0) == (codec == "delta")
        made[codec] = (result.steps, result.trained, steps, answers)
    assert made["full"] == made["delta"]
