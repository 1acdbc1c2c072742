"""The live view as text: curves, sizes, and what is left out where there is no room."""

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncrl.report.live import History, Screen, sparkline
from asyncrl.report.pace import Pace
from asyncrl.report.samples import RolloutSample
from asyncrl.report.summary import RunSummary
from tests.report.shown_live import run_at

SAMPLE = RolloutSample(
    group=7,
    rollout=0,
    attempt=1,
    purpose="train",
    baseline=False,
    row=3,
    data_source="sums",
    prompt="1+1=",
    response="two\nlines",
    ground_truth="2",
    status="ok",
    reward=0.5,
    parts={},
    gain=None,
    error="",
    said={},
    outcome="trained",
    trained_update=4,
    lag=2,
    length=3,
    finish_reason="stop",
    surprise=None,
    worker="generator-0",
    times={},
    turns=(0,),
    messages=(),
    token_ids=(1, 2, 3),
    chosen=(True, True, True),
    logprobs=(-1.0, -1.0, -1.0),
    spans=(),
)


def watched(updates: int, generators: int = 2) -> tuple[RunSummary, Pace, History]:
    pace, history = Pace(), History()
    for update in range(1, updates + 1):
        run = run_at(update, generators)
        pace.update(run)
        history.update(run, pace)
    return run, pace, history


def drawn(screen: Screen, width: int, height: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, height=height, force_terminal=True, no_color=True, color_system=None).print(screen)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([], 8, ""),
        ([1.0], 8, "▁"),
        ([0.0, 7.0], 8, "▁█"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8, "▁▂▃▄▅▆▇█"),
        ([0.0, 2.0, 6.0, 8.0], 2, "▁█"),  # means 1 and 7
        ([3.0, 3.0, 3.0], 8, "▁▁▁"),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_curves(values: list[float], width: int, curve: str) -> None:
    assert sparkline(values, width) == curve


@given(st.lists(st.floats(-1e9, 1e9), max_size=600), st.integers(1, 100))
def test_a_curve_is_as_long_as_it_has_values_or_room(values: list[float], width: int) -> None:
    curve = sparkline(values, width)
    assert len(curve) == min(width, len(values))
    assert not curve or (max(curve) == "█") == (len(set(curve)) > 1)


def test_the_whole_view() -> None:
    lines = drawn(Screen(*watched(100), keys="s newest samples"), 80, 24)
    labels = "sums reward samples/s lag lags groups restarts generator-0 generator-1 learner reward-0 store s"
    assert [line.split()[0] for line in lines] == labels.split()
    assert re.fullmatch(r"sums (█+)(·+) 100/200  1m 40s elapsed, 1m 40s left", lines[0])
    assert abs(lines[0].count("█") - lines[0].count("·")) <= 1
    assert re.fullmatch(r"reward     ▁[▁-█]+█ 0\.5 +held-out   ▁ 0\.250", lines[1])
    assert lines[4] == "lags       0▃ 25%  1▇ 75%"
    assert lines[5] == "groups     108 = 100 trained + 0 filtered + 0 evicted + 0 failed + 8 pending"
    assert lines[9].endswith("busy 60%  sync 10%  wait:store 30%")


@pytest.mark.parametrize("width", [20, 40, 79, 80, 200])
@pytest.mark.parametrize("height", [6, 12, 24, 60])
def test_it_fits_any_terminal_and_leaves_lines_to_the_log(width: int, height: int) -> None:
    for samples in (None, [SAMPLE] * 9, "none yet"):
        lines = drawn(Screen(*watched(30, generators=40), samples, "s newest samples"), width, height)
        assert len(lines) <= max(3, height - 4)
        assert max(map(len, lines)) <= width
        assert (lines[0].startswith("sums"), lines[-1]) == (True, "s newest samples")
    shown = drawn(Screen(*watched(30, generators=40)), width, 24)
    assert any(line.startswith("generator ×40") for line in shown), "too many for a line each"


def test_samples_are_one_line_each_way() -> None:
    lines = drawn(Screen(*watched(3), [SAMPLE], ""), 80, 24)
    assert lines[1:] == ["7/0/1  ok 0.5, 3 tokens, lag 2", "  › 1+1=", "  ‹ two\\nlines"]


def test_a_restored_learner_takes_back_what_it_makes_anew() -> None:
    _run, pace, history = watched(10)
    history.update(run_at(6), pace)
    assert history.values("reward/mean") == [step / 200 for step in range(1, 7)]
    history.update(run_at(7), pace)
    assert history.values("reward/mean")[-1] == 7 / 200
    assert history.values("eval/score") == [0.25]
    history.update(RunSummary(name="sums", total_steps=9, committed=8), pace)
    assert len(history.values("reward/mean")) == 7, "no step, no point"
    broken = run_at(9)
    broken.steps[9].metrics["reward/mean"] = math.nan
    history.update(broken, pace)
    assert len(history.values("reward/mean")) == 7
