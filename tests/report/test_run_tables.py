"""The tables of a page."""

from typing import Any

import numpy as np
import pytest

from asyncrl.report.estimates import estimate, wilson
from asyncrl.report.run_tables import ReadRun, actor_states, lag_map, run_marks, run_tables, started_again
from asyncrl.report.series import MetricLines
from asyncrl.report.tiles import run_tiles


def step(update: int, **figures: float) -> dict[str, Any]:
    return {"kind": "step", "step": update, "time": 100.0 + 10 * update, "samples": 4.0, "tokens/trained": 40.0, **figures}


def facts(**more: Any) -> ReadRun:
    """Ten updates, one every ten seconds from 110 on."""
    updates = np.arange(1, 11)
    known: dict[str, Any] = {
        "name": "run",
        "state": "finished",
        "metrics": MetricLines(steps=[step(update, **{"actor/entropy": float(update)}) for update in updates.tolist()]),
        "settings": {},
        "began": 100.0,
        "commit_updates": updates,
        "commit_times": 100.0 + 10 * updates,
        "reward_updates": np.repeat(updates, 2),
        "reward_means": np.tile([0.0, 1.0], 10),
        "split_updates": updates,
        "split_flight": np.full(10, 0.5),
        "split_queue": np.linspace(0, 0.9, 10),
    }
    return ReadRun(**{**known, **more})


def test_updates_in_buckets() -> None:
    tables = run_tables(facts(), most=5)
    steps = tables["steps"]
    assert steps["update"] == [2, 4, 6, 8, 10]
    assert steps["time"] == [20, 40, 60, 80, 100]
    assert steps["columns"]["actor/entropy"] == {
        "mean": [1.5, 3.5, 5.5, 7.5, 9.5],
        "low": [1, 3, 5, 7, 9],
        "high": [2, 4, 6, 8, 10],
    }
    assert steps["columns"]["samples"] == [4.0] * 5  # no band where all are the same
    assert steps["columns"]["rate/samples_per_s"] == [0.4] * 5  # 8 in 20 s
    assert steps["columns"]["rate/tokens_per_s"] == [4.0] * 5
    assert tables["split"]["columns"]["queue"] == [0.05, 0.25, 0.45, 0.65, 0.85]


def test_intervals_of_rewards_are_over_prompts() -> None:
    reward = run_tables(facts(), most=5)["rewards"]["columns"]["reward"]
    by_hand = estimate([0.0, 1.0, 0.0, 1.0])
    assert by_hand.low is not None
    assert by_hand.high is not None
    assert reward["mean"] == [0.5] * 5
    assert reward["low"] == pytest.approx([by_hand.low] * 5, rel=1e-4)
    assert reward["high"] == pytest.approx([by_hand.high] * 5, rel=1e-4)


def test_intervals_of_held_out_scores() -> None:
    evals = [{"step": update, "time": 100.0, "eval/score": 0.25, "eval/score/a": 0.5} for update in (0, 10)]
    columns = run_tables(facts(metrics=MetricLines(evals=evals), prompts_per_eval=100), most=5)["evals"]["columns"]
    low, high = wilson(0.25, 100)
    assert columns["eval/score"]["low"] == pytest.approx([low, low], rel=1e-4)
    assert columns["eval/score"]["high"] == pytest.approx([high, high], rel=1e-4)
    assert columns["eval/score/a"] == [0.5, 0.5]
    evals[0]["eval/score"] = 1.5  # no share
    assert run_tables(facts(metrics=MetricLines(evals=evals), prompts_per_eval=100), most=5)["evals"]["columns"][
        "eval/score"
    ] == [1.5, 0.25]


def actors(time: float, **seconds: float) -> dict[str, Any]:
    return {"time": time, "step": 0} | {
        f"{name.replace('__', '-0/wait:').replace('_busy', '-0/busy')}_s": s for name, s in seconds.items()
    }


def test_states_add_up_and_a_restart_begins_anew() -> None:
    """A generator that worked 10 s, died for 6 of the next ten, and works again."""
    lines = [
        actors(110.0, generator_busy=8.0, generator__store=2.0),
        actors(120.0, generator_busy=3.0),
        actors(130.0, generator_busy=9.0, generator__store=4.0),
    ]
    found = actor_states(lines)["generator-0"]
    assert found["busy"].tolist() == [8, 3, 6]
    assert found["wait:store"].tolist() == [2, 0, 4]
    assert started_again(lines) == [(120.0, "generator-0")]
    tables = run_tables(facts(metrics=MetricLines(actors=lines)), most=10)
    waits = tables["waits/generator-0"]
    assert waits["time"] == [10, 20, 30]
    assert waits["update"] == [1, 2, 3]
    assert waits["columns"] == {"busy": [0.8, 0.3, 0.6], "wait:store": [0.2, 0.0, 0.4], "unaccounted": [0.0, 0.7, 0.0]}


def test_many_actors_are_averaged_by_role() -> None:
    line = {"time": 110.0, "step": 0, **{f"generator-{i}/busy_s": 10.0 * (i % 2) for i in range(30)}, "store/busy_s": 1.0}
    tables = run_tables(facts(metrics=MetricLines(actors=[line])), most=10)
    assert tables["waits/generator (mean of all)"]["columns"]["busy"] == [0.5]
    assert tables["waits/store"]["columns"]["busy"] == [0.1]


def test_the_map_of_lags_has_shares() -> None:
    shares = {"staleness/lag_0": 0.25, "staleness/lag_2": 0.75, "staleness/lag_mean": 1.5, "staleness/lag_max": 2.0}
    found = lag_map(facts(metrics=MetricLines(steps=[step(update, **shares) for update in range(1, 5)])), most=2)
    assert found == {"update": [2.0, 4.0], "time": [20.0, 40.0], "share": [[0.25, 0.0, 0.75]] * 2}
    assert lag_map(facts(), most=2) is None


def test_trouble_is_placed_on_both_axes() -> None:
    lost = {"evicted": np.array([115.0, 195.0, 196.0]), "failed": np.zeros(0)}
    known = facts(lost=lost, marks=[(115.0, "restart", "generator-0 died")])
    assert run_marks(known) == [{"update": 1.5, "time": 15.0, "kind": "restart", "text": "generator-0 died"}]
    table = run_tables(known, most=8)["lost"]
    assert table["columns"] == {"evicted": [1.0, 2.0]}
    assert table["update"] == [5, 10]
    assert dict(run_tiles(known))["restarts"] == "1"
    assert dict(run_tiles(known))["evicted"] == "3"


def test_a_run_of_which_nothing_is_known() -> None:
    none, no_updates = np.zeros(0), np.zeros(0, np.int64)
    nothing = {"commit_updates": no_updates, "commit_times": none, "reward_updates": no_updates, "reward_means": none}
    split = {"split_updates": no_updates, "split_flight": none, "split_queue": none}
    empty = facts(metrics=MetricLines(), **nothing, **split)
    assert run_tables(empty, most=5) == {}
    assert dict(run_tiles(empty)) == {"updates": "0", "time": "0 s", "restarts": "0"}
