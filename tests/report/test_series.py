"""Lines as columns, and long columns made short."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.report.series import buckets, column, metric_names, read_metrics, shortened, thinned, totals


def encoded(*lines: dict) -> list[bytes]:
    return [json.dumps(line).encode() for line in lines]


def step(update: int, reward: float | None, incarnation: int = 1) -> dict:
    return {"kind": "step", "step": update, "incarnation": incarnation, "time": 10.0 * update, "reward": reward}


def test_what_a_restore_undid_is_not_there() -> None:
    lines = encoded(step(1, 0.1), step(2, 0.2), step(3, 0.3), step(2, 0.25, 2))
    found = read_metrics([*lines, b'{"kind": "step", "st', b""]).steps
    assert [(line["step"], line["reward"]) for line in found] == [(1, 0.1), (2, 0.25)]
    assert [line["step"] for line in read_metrics(lines[:3], newest=1).steps] == [1]  # undone, and not made again yet


def test_kinds_and_what_plots_need_of_actors() -> None:
    actors = {"kind": "actors", "time": 1.0, "step": 0, "a-0/busy_s": 2.0, "a-0/wait:store_s": 1.0, "a-0/pause_s_total": 3.0}
    scale = {"kind": "scale", "time": 2.0, "step": 3, "role": "generator", "count_before": 1, "count": 2, "reason": "so"}
    found = read_metrics(encoded(actors, {"kind": "eval", "step": 0, "eval/score": 0.5}, {"kind": "later", "step": 9}, scale))
    assert found.scalings == [scale]
    assert found.actors == [{"time": 1.0, "step": 0, "a-0/busy_s": 2.0, "a-0/wait:store_s": 1.0}]
    assert [line["eval/score"] for line in found.evals] == [0.5]
    assert found.steps == []


def test_columns_have_gaps_where_a_line_lacks_a_number() -> None:
    lines = [{"a": 1, "kind": "x"}, {"b": 2.5}, {"a": None, "b": 1}]
    assert metric_names(lines) == ["a", "b"]
    assert np.array_equal(column(lines, "a"), [1, np.nan, np.nan], equal_nan=True)


@given(st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=60), st.integers(1, 20))
def test_buckets_hold_every_line_once(values: list[float], most: int) -> None:
    edges = buckets(len(values), most)
    assert len(edges) == min(len(values), most) + 1
    assert (edges[0], edges[-1]) == (0, len(values))
    sizes = np.diff(edges)
    assert sizes.max() - sizes.min() <= 1
    found, sums = thinned(np.array(values), edges), totals(np.array(values), edges)
    for i, (a, b) in enumerate(pairwise(edges)):
        own = [value for value in values[a:b] if value == value]
        assert sums[i] == pytest.approx(sum(own), abs=1e-9)
        figures = [found[name][i] for name in ("mean", "low", "high")]
        if own:
            assert figures == pytest.approx([sum(own) / len(own), min(own), max(own)], abs=1e-9)
        else:
            assert np.isnan(figures).all()


def test_numbers_for_json() -> None:
    values = np.array([0.123456789, -98765.4321, 0.0, np.nan, np.inf, 1e-9, 3.0])
    assert shortened(values) == [0.12346, -98765.0, 0.0, None, None, 1e-9, 3.0]
