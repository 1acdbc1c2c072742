"""What the view says, as text; when plain lines come; and that a terminal gets a live view on standard error."""

import io

import pytest
from msgspec.structs import replace

from asyncrl.report.progress import Pace, Progress, Snapshot, dashboard, one_line, pace
from asyncrl.types import GroupCounts, Report


def report(name: str, **seconds: float) -> Report:
    return Report(name=name, role=name, seconds={state.replace("_", ":"): value for state, value in seconds.items()}, gauges={})


START = Snapshot(
    name="sums",
    elapsed_s=10.0,
    step=20,
    total_steps=100,
    samples=1000,
    reports=(report("learner", busy=4.0, wait_store=6.0), report("generator-0", busy=9.0, sync=1.0)),
)
NOW = Snapshot(
    name="sums",
    elapsed_s=30.0,
    step=40,
    total_steps=100,
    samples=3000,
    metrics={
        "reward/mean": 0.671,
        "response_length/mean": 5.25,
        "staleness/lag_0": 0.25,
        "staleness/lag_1": 0.75,
        "staleness/lag_max": 1.0,
    },
    scores=(0.48, 0.6, 0.81),
    counts=GroupCounts(reserved=400, trained=320, filtered=30, evicted=4, failed=6, pending=40),
    reports=(report("learner", busy=14.0, wait_store=16.0), report("generator-0", busy=3.0, sync=1.0)),
    restarts={"generator-0": 1},
)


def test_pace_is_what_happened_in_between() -> None:
    rate = pace(START, NOW)
    assert rate.samples_per_s == 100.0  # 2000 samples in 20 s
    assert rate.left_s == 60.0  # 60 steps at one a second
    assert rate.shares["learner"] == {"busy": 0.5, "wait:store": 0.5}  # 10 s each of the last 20 s
    assert rate.shares["generator-0"] == {"busy": 0.75, "sync": 0.25}  # restarted: since then
    assert pace(NOW, NOW).left_s is None
    assert pace(START, replace(NOW, step=20, samples=1000)).samples_per_s is None


def test_the_dashboard_shows_everything() -> None:
    lines = dashboard(NOW, pace(START, NOW), width=120).splitlines()
    assert lines == [
        "sums  0m 30s elapsed · 1m 00s left",
        "step     40/100 " + "█" * 11 + "░" * 17 + "  40%   100 samples/s",
        "reward   0.671   held-out 0.480 → 0.810   answer 5.25 tokens",
        "lag      0 ██░░░░ 25%  1 ████░░ 75%",
        "groups   400 = 320 trained + 30 filtered + 4 evicted + 6 failed + 40 pending",
        "generator-0    busy 75%  sync 25%",
        "learner        busy 50%  wait:store 50%",
        "restarts generator-0 ×1",
    ]
    assert max(map(len, dashboard(NOW, pace(START, NOW), width=40).splitlines())) == 40


def test_failing_rewards_are_shown_once_there_are_any() -> None:
    def scoring(invalid: float, timeout: float) -> Snapshot:
        one = Report(name="reward-0", role="reward", seconds={}, gauges={"scored": 9.0, "invalid": invalid, "timeout": timeout})
        return replace(NOW, reports=(one, replace(one, name="reward-1")))

    assert "unscored" not in one_line(scoring(0, 0), Pace()) + dashboard(scoring(0, 0), Pace())
    assert " · unscored 6 invalid · " in one_line(scoring(3, 0), Pace())
    assert "\nunscored 6 invalid + 2 timeout\n" in dashboard(scoring(3, 1), Pace())


def test_before_the_first_step_there_are_no_figures_yet() -> None:
    text = dashboard(Snapshot(name="sums", elapsed_s=1.0, step=0, total_steps=10), Pace())
    assert "held-out –" in text
    assert "– left" in text
    assert "lag" not in text


def test_one_line_holds_the_same() -> None:
    assert one_line(NOW, pace(START, NOW)) == (
        "step 40/100 · reward 0.671 · held-out 0.480 → 0.810 · lag 0:25% 1:75% · 100 samples/s · "
        "busy generator-0 75% learner 50% · "
        "groups 400 = 320 trained + 30 filtered + 4 evicted + 6 failed + 40 pending · 1 restarts · "
        "0m 30s elapsed · 1m 00s left"
    )


def test_plain_lines_come_every_five_seconds_of_progress() -> None:
    stream = io.StringIO()
    progress = Progress(stream)  # no terminal
    for second in range(100):
        step = min(second, 11)  # then nothing moves
        progress.update(Snapshot(name="sums", elapsed_s=float(second), step=step, total_steps=100))
    progress.close()
    progress.close()
    shown = [line.partition(" ·")[0] + line.rpartition(" elapsed")[0][-7:] for line in stream.getvalue().splitlines()]
    # Every 5 s while steps come; half a minute later a sign of life; the last state at the end.
    assert shown == [
        "step 0/100 0m 00s",
        "step 5/100 0m 05s",
        "step 10/100 0m 10s",
        "step 11/100 0m 15s",
        "step 11/100 0m 45s",
        "step 11/100 1m 15s",
        "step 11/100 1m 39s",
    ]


def test_rates_span_the_last_half_minute() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for second in range(0, 121, 10):
        samples = 1000 if second < 60 else 1000 + (second - 60) * 7  # a slow start does not count for ever
        progress.update(Snapshot(name="sums", elapsed_s=float(second), step=second, total_steps=1000, samples=samples))
    assert "7.0 samples/s" in stream.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_live_view(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(stream, live=True)
    progress.update(START)
    progress.update(NOW)
    progress.close()
    assert "40/100" in stream.getvalue()
    assert "groups   400 = 320 trained" in stream.getvalue()
    assert capsys.readouterr().out == ""
