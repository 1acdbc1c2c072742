"""A whole run over a user's reward function that raises; several of them are in tests/test_api.py."""

import signal
from pathlib import Path

import pytest

from asyncrl import launch
from asyncrl.config import RewardSpec
from asyncrl.replay import open as open_replay
from asyncrl.report.summary import RunSummary

pytestmark = pytest.mark.ray

REWARDS = """
import time

def fails_on_odd(data_source, solution_str, ground_truth, extra_info=None):
    print("not for the driver's output")
    if len(solution_str) % 2:
        raise ValueError("an odd answer")
    return 1.0

def hangs(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(600)
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def test_samples_whose_reward_fails_are_counted_named_and_never_trained(
    local_ray, tiny_recipe, hold_after, rewards, metrics_of, tmp_path, caplog
):
    hold = hold_after(4)

    def see(run: RunSummary) -> None:
        if run.failures.invalid:
            hold.release()

    recipe = tiny_recipe(reward=RewardSpec(function=f"{rewards}:fails_on_odd"), algorithm=hold.algorithm, total_steps=12)
    result = launch(recipe, runs_dir=tmp_path, observe=see)
    run = Path(result.run_dir)
    assert result.steps == 12
    assert result.reward_errors == {f"ValueError: an odd answer ({rewards}:7 in fails_on_odd)": result.invalid}
    # Every even answer scores 1 and the odd ones have no reward: any 0 among them would show in the mean.
    assert {step["reward/mean"] for step in metrics_of(run, "step")} == {1.0}
    assert metrics_of(run, "actors")[-1]["reward-0/invalid"] > 0
    rows = open_replay(run).rollouts().to_pylist()
    assert {row["reward"] for row in rows if row["status"] == "invalid"} == {None}
    assert "invalid: ValueError: an odd answer" in (run / "logs" / "reward-0.log").read_text()
    assert caplog.text.count(f"reward {rewards}:fails_on_odd failed on its first sample (group ") == 1
    assert "not for the driver's output" in (run / "logs" / "reward-0.reward.log").read_text()


def test_an_interrupt_does_not_wait_for_a_reward_that_hangs(local_ray, tiny_recipe, rewards, tmp_path):
    told = []

    def interrupt(run: RunSummary) -> None:
        if not (told or run.starting) and run.reports["store"].gauges["store/scoring"]:
            told.append("interrupted")
            signal.raise_signal(signal.SIGINT)

    recipe = tiny_recipe(reward=RewardSpec(function=f"{rewards}:hangs", deadline_s=600.0))
    with pytest.raises(KeyboardInterrupt, match="update 0 is saved in"):
        launch(recipe, runs_dir=tmp_path, observe=interrupt)
