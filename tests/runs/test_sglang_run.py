"""Whole runs with a real SGLang server on CPU: it learns, and a killed scheduler costs time and nothing else."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from asyncrl import RunResult, launch
from asyncrl.config.load import load_specs
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
    """SIGKILLs the process that computes for SGLang, once, when so many updates are committed.

    killed: how many updates were committed.
    """

    def __init__(self, update: int) -> None:
        self._update = update
        self.killed: list[int] = []

    def __call__(self, run: RunSummary) -> None:
        if self.killed or run.committed < self._update or "generator-0" not in run.pids:
            return
        for pid in descendants(run.pids["generator-0"]):
            if computes(pid):
                os.kill(pid, signal.SIGKILL)
                self.killed.append(run.committed)


@pytest.fixture(scope="module")
def run(local_ray: None, arithmetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, KillScheduler]:
    """20 of the 200 updates of recipes/arithmetic.py. The scheduler is killed while more updates are left than rollouts run
    ahead by (max_lag + 1): the run can't end before another server is up."""
    folder = tmp_path_factory.mktemp("sglang-run")
    shutil.copytree(arithmetic_data, folder / "arithmetic" / "data")
    short = ["total_steps=20", "learner.warmup_steps=6", "evaluation.limit=256"]
    recipe, deployment = load_specs(ROOT / "recipes" / "arithmetic.py", DEPLOYMENT, short)
    recipe = resolve_paths(recipe, RunDir(folder / "arithmetic"), ROOT / "recipes")
    killer = KillScheduler(5)
    return launch(recipe, deployment, runs_dir=folder, observe=killer), killer


def test_arithmetic_learns_with_sglang(run, metrics_of):
    """Held-out exact match from at most 0.5 to at least 0.7."""
    result, _ = run
    assert result.steps == 20
    assert result.max_trained_lag <= 4
    assert result.first_score is not None
    assert result.last_score is not None
    assert result.first_score <= 0.5
    assert result.last_score >= 0.7
    gaps = [line["gap/logprob_max_abs"] for line in metrics_of(result.run_dir) if "gap/logprob_max_abs" in line]
    assert gaps, "no token was trained by the very weights that made it: the gap between engine and learner is not seen"
    assert max(gaps) < 1e-4  # fp32: the same weights in two implementations


def test_a_killed_scheduler_is_replaced_and_nothing_is_lost(run, events_of, gauges):
    result, killer = run
    assert len(killer.killed) == 1
    assert killer.killed[0] <= 14
    assert result.restarts == {}, "the generator replaces its server by itself"
    assert result.pending == 0
    assert gauges(result.run_dir, "restarts")[-1] == 1
    assert gauges(result.run_dir, "servers_up")[-1] == 1
    events = events_of(result.run_dir)
    commits = [event for event in events if isinstance(event, ev.BatchCommitted)]
    assert [commit.version.update for commit in commits] == list(range(1, 21))
    trained = [group for commit in commits for group in commit.groups]
    assert len(set(trained)) == len(trained) == result.trained
    reserved = {e.group for e in events if isinstance(e, ev.GroupReserved) and e.purpose == "train"}
    assert len(reserved) == result.trained + result.filtered + result.evicted + result.failed + result.unused
