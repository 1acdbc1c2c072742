"""What a learner says, and what the documentation says that it does, are the same."""

import itertools

import pytest

from asyncrl.report.names import described, table

# kind of a row, and what of it no learner on a CPU, by itself, says: the store adds how episodes went
ELSEWHERE = ("num_turns/", "tools/", "episode/")
NOT_HERE = {"perf/mfu/actor", "perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb"}
SETTINGS = {
    "ppo": {"algorithm": {"adv_estimator": "gae", "clip_ratio_c": 3.0}, "critic": {}},
    "ppo, KL in the reward": {"algorithm": {"adv_estimator": "gae", "kl_coef": 0.1, "kl_in": "reward"}, "critic": {}},
    "grpo, KL in the loss": {"algorithm": {"kl_coef": 0.1, "masks": ("icepop",), "normalize_weights": True}},
    "dpo": {"algorithm": {"policy_loss": "dpo", "correction": "none"}},
}


@pytest.fixture
def said(make_trainer, make_model, awkward) -> dict[str, set[str]]:
    """Names of the metrics of an update, by setting."""
    from msgspec.structs import replace

    sources = itertools.cycle("ab")
    rollouts = [replace(r, data_source=next(sources), parts={"format": 1.0}, finish_reason="length") for r in awkward]
    found = {}
    for name, settings in SETTINGS.items():
        reference = make_model() if "kl_coef" in settings["algorithm"] or name == "dpo" else None
        trainer = make_trainer(**settings, reference=reference, learner={"ppo_epochs": 2})
        found[name] = set(trainer.update(rollouts, 0))  # some tokens are of the present weights
    return found


def rows_of(names: set[str]) -> dict[str, str]:
    """The table's name of each."""
    found = {name: described(name) for name in names}
    assert [name for name, known in found.items() if known is None] == []
    return {name: known.name for name, known in found.items() if known is not None}


def test_every_metric_is_documented_and_nothing_else(said, make_trainer) -> None:
    by_name = rows_of(set().union(*said.values()))
    free = {name for name, row in by_name.items() if row in ("reward/<part>", "actor/<figure>")}
    assert free == {"reward/format"}  # all others have rows of their own
    learner = ("wait_batch", "step", "commit", "publish", "checkpoint", "request_eval", "restore", "rows")
    loop = {f"timing_s/{name}" for name in learner} | {"perf/time_per_step", "perf/throughput"}
    loop |= {f"training/{name}" for name in ("groups", "rollouts", "replayed")}
    documented = {name for row in table() if row.kind == "update" for name in row.each() if not name.startswith(ELSEWHERE)}
    assert documented - set(by_name.values()) - loop - NOT_HERE == {"actor/<figure>"}


def test_figures_are_there_where_they_mean_something(said) -> None:
    assert {"critic/values/min", "critic/returns/max", "actor/pg_clipfrac_lower"} <= said["ppo"]
    assert "critic/values/mean" not in said["grpo, KL in the loss"]
    assert {"critic/advantages/std", "critic/rewards/mean", "clip_ratio/low_mean"}.isdisjoint(said["dpo"])
    assert "critic/score/mean" in said["dpo"]
    assert {"actor/kl_loss", "timing_s/ref"} <= said["grpo, KL in the loss"]
    assert "actor/reward_kl_penalty" in said["ppo, KL in the reward"]
