"""A run whose learner was killed, trained again from its log; and what other algorithms would have made of it."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncrl import Recipe, Trainer
from asyncrl.cli import main
from asyncrl.config import CheckpointSpec, LearnerSpec
from asyncrl.replay.log import events as ev
from asyncrl.rundir import RunDir

pytestmark = pytest.mark.ray
STEPS = 30


@pytest.fixture(scope="module")
def killed(
    local_ray: None,
    tiny_recipe_in: Callable[..., Recipe],
    hold_in: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    """A run at max_lag 4 whose learner is killed between two checkpoints, when updates are there that the newest has not."""
    folder = tmp_path_factory.mktemp("replayed")
    hold = hold_in(folder, 23)
    learner = LearnerSpec(batch_groups=4, lr=1e-2, lr_schedule="cosine")
    kept = CheckpointSpec(save_freq=10, keep_last_n=9)
    recipe = tiny_recipe_in(folder, algorithm=hold.algorithm, learner=learner, checkpoint=kept, total_steps=STEPS)
    killed: list[int] = []

    def kill(run: Any) -> None:
        if not killed and run.committed >= 14 and "learner" in run.pids:
            killed.append(run.pids["learner"])
            os.kill(killed[0], signal.SIGKILL)
            hold.release()

    with Trainer(recipe, runs_dir=folder, observe=kill) as trainer:
        trainer.fit()
        assert trainer.finish().restarts == {"learner": 1}
    return trainer.paths


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_a_run_with_a_killed_learner_is_made_again_to_the_bit(killed: RunDir, events_of, capsys) -> None:
    events = events_of(killed.path)
    fences = [e for e in events if isinstance(e, ev.LearnerFenced)]
    assert [fence.incarnation for fence in fences] == [1, 2]
    made_before = {e.version.update for e in events[: events.index(fences[1])] if isinstance(e, ev.BatchCommitted)}
    assert max(made_before) > fences[1].committed >= 10, "nothing was trained twice"

    assert main(["replay", str(killed.path)]) == 0
    told = lines(capsys)
    assert (told["begin"], told["end"], told["equal"]) == (0, STEPS, True)
    assert told["checkpoints"] == [10, 20, STEPS]
    assert told["metrics"] > 20 * STEPS
    commits = {e.version.update: e.metrics for e in events if isinstance(e, ev.BatchCommitted)}
    assert max(metrics["staleness/lag_max"] for metrics in commits.values()) >= 2, "nothing was stale"


def test_under_other_settings_it_is_told_where_it_first_differs(killed: RunDir, tmp_path: Path, capsys) -> None:
    other = RunDir(tmp_path / "other")
    shutil.copytree(killed.path, other.path)
    recipe = json.loads(other.recipe.read_text())
    recipe["learner"]["eps"] *= 1_000  # less may be lost in rounding for an update
    other.recipe.write_text(json.dumps(recipe))
    assert main(["replay", str(other.path), "--from", "10"]) == 1
    told = lines(capsys)
    assert (told["begin"], told["end"], told["equal"]) == (10, 20, False), "not past the first checkpoint that differs"
    assert told["first_metric"]["update"] == 12, "update 11 began with the same weights"
    assert told["first_metric"]["logged"] != told["first_metric"]["replayed"]
    assert told["first_weights"]["checkpoint"] == 20
    assert 0 < told["first_weights"]["max_abs_difference"] < 1e-2, told


def test_other_algorithms_are_asked_of_the_stored_batches(killed: RunDir, capsys) -> None:
    settings = ["algorithm.policy_loss=ppo", "+", "algorithm.policy_loss=ppo", "algorithm.adv_estimator=grpo_no_std"]
    assert main(["audit", str(killed.path), "--every", "5", "--json", *settings]) == 0
    told = lines(capsys)
    assert told["as_logged"]
    assert told["updates"] == [1, 6, 11, 16, 21, 26]
    own, ppo, other = told["settings"]
    assert [of["setting"] for of in (own, ppo, other)] == [
        "as it ran",
        "policy_loss=ppo",
        "policy_loss=ppo adv_estimator=grpo_no_std",
    ]
    logged = {
        line["step"]: line["actor/grad_norm"]
        for line in map(json.loads, killed.metrics.read_text().splitlines())
        if line["kind"] == "step"
    }
    assert [figures["gradient/norm"] for figures in own["updates"]] == pytest.approx(
        [logged[u] for u in told["updates"]], rel=1e-5
    )
    # The run's loss is a policy gradient, which at its only step of a batch is that of PPO.
    assert ppo["mean"]["gradient/cosine"] == pytest.approx(1, rel=1e-6)
    # Rewards from 0 to 1 deviate by less than 1, by which GRPO divides.
    norms = [sum(figures["gradient/norm"] for figures in of["updates"]) for of in (own, other)]
    assert other["mean"]["gradient/cosine"] > 0.5
    assert 0 < norms[1] < 0.8 * norms[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["algorithm.policy_los=gspo"], "policy_loss"),
        (["algorithm.policy_loss=gspp"], "did you mean 'gspo'?"),
        (["learner.lr=1"], "only algorithm.FIELD=VALUE"),
        (["algorithm.masks=icepop", "+", "algorithm.adv_estimator=gae"], "adv_estimator=gae: the run had no critic"),
        (["algorithm.adv_estimator=remax"], "no greedy rollouts"),
        (["--every", "0"], "--every 0 < 1"),
    ],
)
def test_what_can_not_be_asked_is_told(words: list[str], told: str, killed: RunDir, capsys) -> None:
    assert main(["audit", str(killed.path), *words]) == 2
    assert told in capsys.readouterr().err
