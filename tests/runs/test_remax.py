"""Whole runs of ReMax: each group has a greedy rollout that is compared with, logged, and never trained; turns and tokens
earn rewards of their own."""

import os
import signal
from collections import defaultdict
from typing import Any

import pytest

from asyncrl import Trainer, launch
from asyncrl.config import (
    AlgorithmSpec,
    CheckpointSpec,
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    LimitsSpec,
    RewardSpec,
)
from asyncrl.errors import ConfigError
from asyncrl.replay import open as open_replay
from asyncrl.replay.log import events as ev

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TURNS = """
def compute_score(data_source, solution_str, ground_truth, *, response_ids, turns):
    earned = [(token == 9) / 3 for token in response_ids]
    return {"score": solution_str.count(ground_truth) / 6, "turn_rewards": [0.1 for _ in turns], "token_rewards": earned}
"""


def test_a_run_with_baselines(local_ray, tiny_recipe, tmp_path):
    """The group of 4 + 1 fits the 5 slots exactly."""
    remax, learner = AlgorithmSpec(adv_estimator="remax"), LearnerSpec(batch_groups=4, lr=1e-2)
    recipe = tiny_recipe(algorithm=remax, learner=learner, total_steps=5)
    deployment = Deployment(generators=GeneratorsSpec(engine=EngineSpec(slots=5, max_length=40)))
    metrics: dict[int, dict[str, float]] = {}

    def watch(run: Any) -> None:
        metrics.update({update: record.metrics for update, record in run.steps.items()})

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


def test_baselines_and_token_rewards_survive_a_killed_store_and_learner(
    local_ray, tiny_recipe, hold_after, events_of, tmp_path
):
    """What is retrained from the log after the kills has the figures that it had before."""
    (tmp_path / "turns.py").write_text(TURNS)
    hold = hold_after(45, adv_estimator="remax")
    recipe = tiny_recipe(
        algorithm=hold.algorithm,
        reward=RewardSpec(function=f"{tmp_path}/turns.py:compute_score"),
        checkpoint=CheckpointSpec(save_freq=1000),
        total_steps=60,
    )
    due = {5: "store", 20: "learner"}

    def kill(run: Any) -> None:
        for update in [u for u in due if run.committed >= u and due[u] in run.pids]:
            os.kill(run.pids[due.pop(update)], signal.SIGKILL)
        if not due:
            hold.release()

    with Trainer(recipe, Deployment(limits=LimitsSpec(poll_s=0.5)), runs_dir=tmp_path, observe=kill) as trainer:
        trainer.fit()
        result = trainer.finish()
    assert result.restarts == {"store": 1, "learner": 1}
    log = open_replay(result.run_dir)
    commits = {e.version: e for e in events_of(result.run_dir) if isinstance(e, ev.BatchCommitted)}
    lost = {v.update: e for v, e in commits.items() if v.incarnation == 1}
    again = [(lost[v.update], e) for v, e in commits.items() if v.incarnation == 2 and v.update in lost]
    assert len(again) >= 20
    for first, second in again:
        assert first.groups == second.groups
        for name in ("reward/mean", "reward/token_sum", "reward/baseline", "samples"):
            assert first.metrics[name] == second.metrics[name], name
    for row in log.rollouts().to_pylist():
        if row["status"] == "ok":
            expected = [(token == 9) / 3 for token in row["response_ids"]]
            expected[-1] += 0.1
            assert row["token_rewards"] == expected
