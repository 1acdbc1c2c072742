"""Which knob to turn."""

from typing import Any

import numpy as np
import pytest

from asyncrl.report.advice import Standing, advice, standing
from asyncrl.report.run_tables import ReadRun
from asyncrl.report.series import MetricLines


def now(learner: float, generator: float, **more: Any) -> Standing:
    """Whoever does not compute waits for the store."""
    busy = {"learner": learner, "generator": generator}
    return Standing(busy=busy, waits={role: 1 - share for role, share in busy.items()}, **more)


@pytest.mark.parametrize(
    ("of", "knobs"),
    [
        (now(0.95, 0.5), ["deploy.learner (more ranks, a faster device)"]),
        (now(0.5, 0.95), ["deploy.generators.count, or deploy.generators.engine.slots"]),
        (now(0.5, 0.95, limits={"stragglers": 0.3}), ["staleness.max_lag (up)"]),
        (now(0.5, 0.5, limits={"reserve_ahead": 0.6, "max_lag": 0.1}), ["staleness.reserve_ahead (up)"]),
        (now(0.5, 0.5, limits={"reserve_ahead": 0.1, "max_lag": 0.6}), ["staleness.max_lag (up)"]),
        (now(0.5, 0.5, limits={"reserve_ahead": 0.01}), ["deploy.rewards"]),
        (now(0.5, 0.5), ["deploy.rewards"]),
        (Standing(busy={"learner": 0.8, "generator": 0.5}, waits={"learner": 0.1, "generator": 0.5}), [""]),
        (Standing(), []),
        (Standing(flight=0.2, queue=1.5), ["staleness.reserve_ahead (down)"]),
        (Standing(flight=0.2, queue=1.5, limits={"stragglers": 0.5}), [""]),
        (Standing(flight=2.0, queue=0.5), ["deploy.generators.count (up), sampling.max_response_length (down)"]),
        (Standing(flight=0.1, queue=0.2), []),
        (Standing(masked=0.2), ["staleness.max_lag (up)"]),
    ],
)
def test_rules(of: Standing, knobs: list[str]) -> None:
    found = advice(of)
    assert [one.knob for one in found] == knobs
    assert all(one.rule for one in found)


def test_the_second_half_of_a_run_is_judged() -> None:
    """At first the generators wait for their start, and the learner for all of them."""
    lines = [
        {"time": 10.0, "learner/wait:store_s": 10.0, "generator-0/wait:start_s": 10.0, "generator-1/wait:start_s": 10.0},
        {"time": 20.0, "learner/wait:store_s": 12.0, "generator-0/wait:start_s": 10.0, "generator-1/wait:start_s": 10.0}
        | {"learner/busy_s": 8.0, "generator-0/busy_s": 10.0, "generator-1/sync_s": 4.0, "generator-1/wait:store_s": 6.0}
        | {"store/limit/max_lag": 0.25},
    ]
    masked = [{"step": 1, "time": 5.0, "staleness/masked_share": 0.5}, {"step": 2, "time": 20.0, "staleness/masked_share": 0.1}]
    found = standing(
        ReadRun(
            name="run",
            state="",
            metrics=MetricLines(steps=masked, actors=lines),
            settings={},
            began=0.0,
            commit_updates=np.array([1, 2]),
            commit_times=np.array([5.0, 20.0]),
            reward_updates=np.zeros(0),
            reward_means=np.zeros(0),
            split_updates=np.array([1, 2]),
            split_flight=np.array([9.0, 1.0]),
            split_queue=np.array([9.0, 2.0]),
        )
    )
    assert found.busy == pytest.approx({"learner": 0.8, "generator": 0.7})
    assert found.waits == pytest.approx({"learner": 0.2, "generator": 0.3})
    assert found.limits == {"max_lag": 0.25}
    assert (found.flight, found.queue, found.masked) == (1.0, 2.0, 0.1)
