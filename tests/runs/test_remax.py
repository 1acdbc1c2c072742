"""Whole runs of ReMax: each group has a greedy rollout that is compared with, logged, and never trained; turns and tokens
earn rewards of their own."""

import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncrl import Trainer, launch
from asyncrl.config import CheckpointSpec, Deployment, EngineSpec, GeneratorsSpec, LimitsSpec, Recipe, RewardSpec
from asyncrl.errors import ConfigError
from asyncrl.replay import open as open_replay
from asyncrl.replay.log import events as ev
from asyncrl.rundir import RunDir

pytestmark = pytest.mark.ray

TURNS = """
def compute_score(data_source, solution_str, ground_truth, *, response_ids, turns):
    earned = [(token == 9) / 3 for token in response_ids]
    return {"score": solution_str.count(ground_truth) / 6, "turn_rewards": [0.1 for _ in turns], "token_rewards": earned}
"""


@pytest.fixture(scope="module")
def killed(
    local_ray: None,
    tiny_recipe_in: Callable[..., Recipe],
    hold_in: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    """A run whose store and learner are killed. The group of 4 + 1 fits the 5 slots exactly."""
    folder = tmp_path_factory.mktemp("remax")
    (folder / "turns.py").write_text(TURNS)
    hold = hold_in(folder, 25, adv_estimator="remax")
    recipe = tiny_recipe_in(
        folder,
        algorithm=hold.algorithm,
        reward=RewardSpec(function=f"{folder}/turns.py:compute_score"),
        checkpoint=CheckpointSpec(save_freq=1000),
        total_steps=35,
    )
    engine = EngineSpec(slots=5, max_length=40)
    deployment = Deployment(generators=GeneratorsSpec(engine=engine), limits=LimitsSpec(poll_s=0.5))
    due = {5: "store", 12: "learner"}

    def kill(run: Any) -> None:
        for update in [u for u in due if run.committed >= u and due[u] in run.pids]:
            os.kill(run.pids[due.pop(update)], signal.SIGKILL)
        if not due:
            hold.release()

    with Trainer(recipe, deployment, runs_dir=folder, observe=kill) as trainer:
        trainer.fit()
        result = trainer.finish()
    assert result.restarts == {"store": 1, "learner": 1}
    assert (result.steps, result.trained, result.samples) == (35, 35 * 4, 35 * 4 * 4)
    return trainer.paths


def test_a_run_with_baselines(killed: RunDir, events_of: Callable[[Path], list[Any]]) -> None:
    metrics = {e.version.update: e.metrics for e in events_of(killed.path) if isinstance(e, ev.BatchCommitted)}  # the newest
    assert sorted(metrics) == list(range(1, 36))
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in open_replay(killed.path).rollouts().to_pylist():
        if row["outcome"] == "trained":
            groups[row["trained_update"], row["group"]].append(row)
    earned, advantages = defaultdict(list), []
    for (update, _), rows in groups.items():
        assert sorted((row["rollout"], row["baseline"]) for row in rows) == [*((i, False) for i in range(4)), (4, True)]
        (greedy,) = (row for row in rows if row["baseline"])
        earned[update].append(greedy["reward"] + sum(greedy["token_rewards"]))
        assert set(greedy["logprobs"]) == {0.0}  # a point mass
        if update == 1:
            for row in (row for row in rows if not row["baseline"]):
                tokens = range(len(row["response_ids"]))
                advantages += [row["reward"] + sum(row["token_rewards"][t:]) - earned[update][-1] for t in tokens]
    # Tokens of the first batch come from the very weights that it trains: every ratio is 1, and its loss says its advantages.
    assert metrics[1]["actor/pg_loss"] == pytest.approx(-sum(advantages) / len(advantages), abs=1e-4)
    for update, told in metrics.items():
        assert told["reward/baseline"] == pytest.approx(sum(earned[update]) / 4)
        assert told["training/rollouts"] == told["samples"] == 16
        assert told["staleness/lag_max"] <= 4


def test_resuming_without_baselines_is_refused(killed: RunDir, tiny_recipe_in: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match="baseline per group"):
        launch(tiny_recipe_in(killed.path.parent, total_steps=40), runs_dir=killed.path.parent, resume=True)


def test_baselines_and_token_rewards_survive_a_killed_store_and_learner(
    killed: RunDir, events_of: Callable[[Path], list[Any]]
) -> None:
    """What is retrained from the log after the kills has the figures that it had before."""
    commits = {e.version: e for e in events_of(killed.path) if isinstance(e, ev.BatchCommitted)}
    lost = {v.update: e for v, e in commits.items() if v.incarnation == 1}
    again = [(lost[v.update], e) for v, e in commits.items() if v.incarnation == 2 and v.update in lost]
    assert len(again) >= 12
    for first, second in again:
        assert first.groups == second.groups
        for name in ("reward/mean", "reward/token_sum", "reward/baseline", "samples"):
            assert first.metrics[name] == second.metrics[name], name
    for row in open_replay(killed.path).rollouts().to_pylist():
        if row["status"] == "ok":
            expected = [(token == 9) / 3 for token in row["response_ids"]]
            expected[-1] += 0.1
            assert row["token_rewards"] == expected
