"""Numbers of starts, from which incarnations are made: the clock may say what it likes."""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncrl.cluster.plan import RunPlan, next_start
from asyncrl.config import DataSpec, Deployment, ModelSpec, Recipe, RewardSpec
from asyncrl.rundir import RunDir

RECIPE = Recipe(
    name="plan", model=ModelSpec(path="m"), data=DataSpec(files=("d.jsonl",)), reward=RewardSpec(function="r:f"), total_steps=1
)


def start(paths: RunDir) -> RunPlan:
    plan = RunPlan(recipe=RECIPE, deployment=Deployment(), run_dir=str(paths.path), started=next_start(paths), loopback=True)
    plan.mark_start()
    return plan


@given(clocks=st.lists(st.integers(0, 2**62), min_size=2, max_size=8), restarts=st.integers(0, 1000))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_incarnations_rise_with_every_start_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clocks: list[int], restarts: int
) -> None:
    """A clock set back fenced every generator of a resumed run: the store took them for zombies of the first."""
    paths, newest = RunDir(tmp_path), 0
    for clock in clocks:
        monkeypatch.setattr(time, "time_ns", lambda clock=clock: clock)
        plan = start(paths)
        assert plan.incarnation(0) > newest
        assert plan.started >= clock
        newest = plan.incarnation(restarts)


def test_actors_see_the_start_that_they_belong_to(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    plan = start(paths)
    plan.check_reach()
    with pytest.raises(Exception, match="does not see the run directory"):
        replace(plan, started=plan.started + 1).check_reach()
