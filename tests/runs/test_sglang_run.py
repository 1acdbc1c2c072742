"""Whole runs with a real SGLang server on CPU: it learns, and a killed scheduler costs time and nothing else."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from asyncrl import launch
from asyncrl.config import CheckpointSpec, StalenessSpec
from asyncrl.config.load import load_deployment, load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.replay.log import events as ev
from asyncrl.report.summary import RunSummary
from asyncrl.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENT = ROOT / "deploy" / "local-sglang.yaml"

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("sglang_on_cpu")]


@pytest.fixture
def gauges(metrics_of: Callable[..., list[dict[str, Any]]]) -> Callable[[str, str], list[float]]:
    """A gauge of the generator's engine over the run."""

    def read(run_dir: str, name: str) -> list[float]:
        return [line[key] for line in metrics_of(run_dir) if (key := f"generator-0/engine/{name}") in line]

    return read


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # one that ends meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def computes(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("sglang::schedul")
    return False


class KillScheduler:
    """SIGKILLs the process that computes for SGLang, once, when so many updates are committed; then lets go of `hold`.

    killed: how many updates were committed.
    """

    def __init__(self, update: int, hold: Any) -> None:
        self._update = update
        self._hold = hold
        self.killed: list[int] = []

    def __call__(self, run: RunSummary) -> None:
        if self.killed or run.committed < self._update or "generator-0" not in run.pids:
            return
        for pid in descendants(run.pids["generator-0"]):
            if computes(pid):
                os.kill(pid, signal.SIGKILL)
                self.killed.append(run.committed)
                self._hold.release()


@pytest.mark.timeout(600)
def test_arithmetic_learns_with_sglang(local_ray, arithmetic_data, metrics_of, gauges, tmp_path):
    """40 of the 200 updates: held-out exact match from at most 0.5 to at least 0.7."""
    shutil.copytree(arithmetic_data, tmp_path / "arithmetic" / "data")
    recipe, deployment = load_specs(ROOT / "recipes" / "arithmetic.py", DEPLOYMENT, ["total_steps=40"])
    recipe = resolve_paths(recipe, RunDir(tmp_path / "arithmetic"), ROOT / "recipes")
    result = launch(recipe, deployment, runs_dir=tmp_path)
    assert result.steps == 40
    assert result.restarts == {}
    assert result.max_trained_lag <= 4
    assert result.first_score is not None
    assert result.last_score is not None
    assert result.first_score <= 0.5
    assert result.last_score >= 0.7
    assert result.pending == 0
    gaps = [line["gap/logprob_max_abs"] for line in metrics_of(result.run_dir) if "gap/logprob_max_abs" in line]
    assert gaps, "no token was trained by the very weights that made it: the gap between engine and learner is not seen"
    assert max(gaps) < 1e-4  # fp32: the same weights in two implementations
    assert gauges(result.run_dir, "restarts")[-1] == 0


@pytest.mark.timeout(300)
def test_a_killed_scheduler_is_replaced_and_nothing_is_lost(local_ray, tiny_recipe, hold_after, events_of, gauges, tmp_path):
    hold, steps = hold_after(50), 100
    killer = KillScheduler(5, hold)
    recipe = tiny_recipe(
        total_steps=steps,
        algorithm=hold.algorithm,
        staleness=StalenessSpec(max_lag=2),
        checkpoint=CheckpointSpec(save_freq=1000),
    )
    result = launch(recipe, load_deployment(DEPLOYMENT), runs_dir=tmp_path, observe=killer)
    assert len(killer.killed) == 1
    assert killer.killed[0] <= 50
    assert result.restarts == {}, "the generator replaces its server by itself"
    assert result.steps == steps
    assert result.pending == 0
    assert gauges(result.run_dir, "restarts")[-1] == 1
    assert gauges(result.run_dir, "servers_up")[-1] == 1
    events = events_of(result.run_dir)
    commits = [event for event in events if isinstance(event, ev.BatchCommitted)]
    assert [commit.version.update for commit in commits] == list(range(1, steps + 1))
    trained = [group for commit in commits for group in commit.groups]
    assert len(set(trained)) == len(trained) == result.trained
    reserved = {e.group for e in events if isinstance(e, ev.GroupReserved) and e.purpose == "train"}
    assert len(reserved) == result.trained + result.filtered + result.evicted + result.failed
