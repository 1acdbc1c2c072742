"""Simulated runs that grow, shrink and lose nodes, against fixed ones and against what can be said without one."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.config import (
    CountRange,
    DataSpec,
    Deployment,
    EngineSpec,
    GeneratorsSpec,
    LearnerSpec,
    LimitsSpec,
    ModelSpec,
    Recipe,
    RewardSpec,
    SamplingSpec,
    StalenessSpec,
)
from asyncrl.errors import DataError
from asyncrl.simulate.costs import Costs
from asyncrl.simulate.elastic import Trace, random_trace, read_trace
from asyncrl.simulate.simulation import simulate

RECIPE = Recipe(
    name="r",
    model=ModelSpec(path="m"),
    data=DataSpec(files=("f",)),
    reward=RewardSpec(function="a:b"),
    sampling=SamplingSpec(n=4),
    staleness=StalenessSpec(max_lag=16),
    learner=LearnerSpec(batch_groups=8),
    total_steps=1,
)
NOTHING = dict.fromkeys(("row_s", "pause_s", "deliver_s", "token_s", "publish_s", "score_s", "rows_s", "call_s"), 0.0)
TAIL = [[10, 20, 20, 60], [10, 10, 15, 20], [5, 5, 20, 60], [30, 30, 30, 30]]


def run(
    count: int | CountRange, updates: int = 50, trace: Trace | None = None, update_s: float = 0.5, **costs: float
) -> dict[str, float]:
    """Of engines with 16 slots, which need 23 steps of 0.05 s for a rollout on average; a look every ten seconds."""
    deployment = Deployment(
        generators=GeneratorsSpec(count=count, engine=EngineSpec(slots=16)), limits=LimitsSpec(scale_every_s=10.0)
    )
    paid = Costs(**NOTHING | {"step_s": 0.05, "update_s": update_s, "start_s": 5.0} | costs)
    return simulate(RECIPE, deployment, paid, TAIL, updates, trace)


def test_a_run_finds_as_many_generators_as_its_learner_needs() -> None:
    """64 rollouts a second are 64 · 23 · 0.05 s = 75 slots: five engines."""
    fixed, found = run(16, updates=50), run(CountRange(min=1, max=16), updates=300)
    assert fixed["samples/s"] == pytest.approx(64, rel=0.05)
    assert found["samples/s"] >= 0.8 * fixed["samples/s"]
    assert 5 <= found["generators"] <= 9
    assert found["worst lag"] <= 16
    assert found["lost"] == 0


def test_generators_are_given_up_when_the_learner_is_slow() -> None:
    found, fixed = run(CountRange(min=1, max=16), update_s=2.0), run(16, update_s=2.0)
    assert found["samples/s"] == pytest.approx(fixed["samples/s"], rel=0.05)
    assert found["generators"] < 4


def test_nodes_that_are_taken_cost_what_they_held_and_the_time_without_them() -> None:
    half = run(4, trace=[(0.0, 4), (20.0, 2), (40.0, 4)], update_s=0.1)
    whole, two = run(4, update_s=0.1), run(2, update_s=0.1)
    assert two["samples/s"] < half["samples/s"] < whole["samples/s"]
    assert 0 < half["lost"] < 0.05
    assert (whole["lost"], whole["generators"]) == (0.0, pytest.approx(4))
    assert half["worst lag"] <= 16


@pytest.mark.timeout(60)  # what a dead generator still brought kept its group from being given to another, for ever
def test_what_is_on_its_way_from_a_node_that_is_taken_is_lost() -> None:
    trace = [(10.0 * i, 4 - i % 2) for i in range(40)]
    found = run(4, trace=trace, updates=150, call_s=0.5)
    assert found["samples/s"] > 0
    assert 0 < found["lost"] < 0.2


def test_a_run_without_a_node_waits_for_one() -> None:
    found = run(2, trace=[(0.0, 2), (20.0, 0), (50.0, 2)], updates=50)
    assert found["samples/s"] > 0
    assert found["generators"] < 1.6
    assert found["learner idle"] > 0.3


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(5, 8), st.floats(20.0, 200.0), st.floats(5.0, 50.0))
def test_the_bound_holds_however_nodes_come_and_go(seed: int, least: int, most: int, life_s: float, away_s: float) -> None:
    trace = random_trace(most, life_s, away_s, seed, changes=500)
    found = run(CountRange(min=least, max=most), updates=15, trace=trace)
    assert found["worst lag"] <= 16
    assert (found["masked"], found["dropped"]) == (0.0, 0.0)
    assert 0 < found["generators"] <= most


def test_a_random_trace_is_away_as_often_as_it_is_told() -> None:
    trace = random_trace(10, 300.0, 100.0, 1)
    spent = [(after[0] - before[0], before[1]) for before, after in itertools.pairwise(trace)]
    assert sum(s * n for s, n in spent) / sum(s for s, _ in spent) == pytest.approx(7.5, rel=0.03)
    assert all(0 <= nodes <= 10 for _, nodes in trace)
    assert trace == random_trace(10, 300.0, 100.0, 1) != random_trace(10, 300.0, 100.0, 2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0 4\n60 x\n", "invalid literal"),
        ("0 4 5\n", "too many values"),
        ("5 4\n", "seconds must begin at 0 and rise"),
        ("0 4\n9 2\n9 3\n", "seconds must begin at 0 and rise"),
        ("# nothing\n", "seconds must begin at 0 and rise"),
        ("0 0\n", "there is never a node"),
        ("0 4\n5 -1\n", "there is never a node"),
    ],
)
def test_a_trace_that_says_nothing_is_refused_with_its_name(tmp_path: Any, text: str, told: str) -> None:
    path = tmp_path / "nodes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"nodes\.txt: .*{told}"):
        read_trace(str(path))
    path.write_text("0 4  # begins\n\n60 2\n")
    assert read_trace(str(path)) == [(0.0, 4), (60.0, 2)]
    with pytest.raises(DataError, match="No such file"):
        read_trace(str(tmp_path / "none"))
