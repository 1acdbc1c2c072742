"""Whole runs whose weights travel as deltas, and from generator to generator: to the bit what they are otherwise."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from asyncrl import launch
from asyncrl.config import BusSpec, Deployment, EngineSpec, GeneratorsSpec, LearnerSpec, StalenessSpec
from asyncrl.replay import open as open_replay

BUS = BusSpec(transport="tcp", bucket_bytes=4096)
GENERATORS = GeneratorsSpec(engine=EngineSpec(slots=8, max_length=32, deterministic=True))
WAYS = {
    "whole": Deployment(generators=GENERATORS, bus=BUS),
    "relayed deltas": Deployment(generators=replace(GENERATORS, count=2), bus=replace(BUS, codec="delta", fanout=1)),
}


@pytest.mark.ray
def test_however_weights_travel_a_run_is_the_same(
    local_ray, tiny_recipe, tmp_path: Path, metrics_of, assert_nothing_lost, events_of
) -> None:
    """lr is so small that most of the float32 weights stay: else no delta would pay."""
    recipe = tiny_recipe(staleness=StalenessSpec(max_lag=0), learner=LearnerSpec(batch_groups=4, lr=4e-9), seed=3)
    made = {}
    for way, deployment in WAYS.items():
        result = launch(recipe, deployment, runs_dir=tmp_path / way)
        assert_nothing_lost(events_of(result.run_dir), result)
        rows = [row for row in open_replay(result.run_dir).rollouts().to_pylist() if row["outcome"] == "trained"]
        answers = sorted((row["group"], row["rollout"], row["response_ids"], row["logprobs"], row["reward"]) for row in rows)
        lines = metrics_of(result.run_dir, "step")
        assert max(line["gap/logprob_max_abs"] for line in lines) <= 1e-5
        steps = [(line["actor/pg_loss"], line["actor/grad_norm"], line["reward/mean"]) for line in lines]
        newest: dict[str, float] = {}
        for line in metrics_of(result.run_dir, "actors"):
            newest |= line
        count = {
            what: sum(value for name, value in newest.items() if name.endswith(f"/bus/{what}"))
            for what in ("versions", "delta_versions", "relayed_versions", "bad_transfers", "sent_bytes", "staged_bytes")
        }
        assert count["bad_transfers"] == 0
        assert (count["delta_versions"] > 0) == (count["relayed_versions"] > 0) == (way == "relayed deltas")
        own = count["versions"] - count["relayed_versions"]
        assert count["sent_bytes"] <= (own + 1) * count["staged_bytes"]  # one may be on its way
        made[way] = (result.steps, result.trained, steps, answers)
    assert made["whole"] == made["relayed deltas"]
