"""What the view says, as text; when plain lines come; and that a terminal gets a live view on standard error."""

import errno
import io
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from asyncrl.report.live import History, Screen
from asyncrl.report.pace import Pace
from asyncrl.report.progress import Progress, WarmStartLines, one_line
from asyncrl.report.summary import RunSummary
from asyncrl.types import GroupCounts, Record, Report, RewardFailures, Version


def record(update: int, **metrics: float) -> Record:
    return Record(sequence=update, time=0.0, kind="step", version=Version(1, update), metrics=metrics)


def reports(**actors: dict[str, float]) -> dict[str, Report]:
    return {name: Report(name=name, role=name, seconds=seconds, gauges={}) for name, seconds in actors.items()}


START = RunSummary(
    name="sums",
    elapsed_s=10.0,
    committed=20,
    total_steps=100,
    steps={20: record(20, samples=1000.0)},
    reports=reports(learner={"busy": 4.0, "wait:store": 6.0}, generator={"busy": 9.0, "sync": 1.0}),
)
NOW = RunSummary(
    name="sums",
    elapsed_s=30.0,
    committed=40,
    total_steps=100,
    steps={
        20: record(20, samples=1000.0),
        40: record(
            40,
            **{"samples": 2000.0, "reward/mean": 0.671, "response_length/mean": 5.25},
            **{"staleness/lag_0": 0.25, "staleness/lag_1": 0.75, "staleness/lag_max": 1.0},
        ),
    },
    evals={update: record(update, **{"eval/score": score}) for update, score in ((0, 0.48), (20, 0.6), (40, 0.81))},
    counts=GroupCounts(reserved=400, trained=320, filtered=30, evicted=4, failed=6, pending=40),
    reports=reports(learner={"busy": 14.0, "wait:store": 16.0}, generator={"busy": 3.0, "sync": 1.0}),
    restarts={"generator": 1},
)


def pace(*runs: RunSummary) -> Pace:
    made = Pace()
    for run in runs:
        made.update(run)
    return made


def drawn(run: RunSummary, rate: Pace, width: int = 120) -> list[str]:
    """The live view's lines on a terminal without colours."""
    stream = io.StringIO()
    history = History()
    history.update(run, rate)
    Console(file=stream, width=width, no_color=True, markup=False, highlight=False).print(Screen(run, rate, history))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_pace_is_what_happened_in_between() -> None:
    rate = pace(START, NOW)
    assert rate.samples_per_s == 100.0  # 2000 samples in 20 s
    assert rate.left_s == 60.0  # 60 steps at one a second
    assert rate.shares["learner"] == {"busy": 0.5, "wait:store": 0.5}  # 10 s each of the last 20 s
    assert rate.shares["generator"] == {"busy": 0.75, "sync": 0.25}  # restarted: since then
    assert pace(NOW, NOW).left_s is None
    assert pace(START, replace(NOW, committed=20, steps=START.steps)).samples_per_s is None


def test_a_name_is_no_markup() -> None:
    assert drawn(replace(NOW, name="a[red]b"), Pace())[0].startswith("a[red]b")


def test_failing_rewards_are_shown_once_there_are_any() -> None:
    def failing(**failures: Any) -> RunSummary:
        return replace(NOW, failures=RewardFailures(**failures))

    assert "unscored" not in one_line(NOW, Pace()) + "".join(drawn(NOW, Pace()))
    once = failing(invalid=6, errors={"ValueError: no (a.py:3 in f)": 5, "KeyError: " + 40 * "long, " + "(a.py:4 in f)": 1})
    end = ", long, long, long, long, long, (a.py:4 in f)"
    shown = f"unscored 6 invalid (5 × ValueError: no (a.py:3 in f); 1 × KeyError: {'long, ' * 6}long"
    assert f" · {shown} …" in one_line(once, Pace())
    assert f"{end}) · " in one_line(once, Pace())
    assert "unscored   6 invalid + 2 timeout (2 × late)" in drawn(failing(invalid=6, timeout=2, errors={"late": 2}), Pace())


def test_what_a_run_did_not_use_is_shown_once_there_is_any() -> None:
    assert "unused" not in one_line(NOW, Pace())
    ended = replace(NOW, counts=GroupCounts(reserved=400, trained=320, failed=30, unused=50))
    assert "400 = 320 trained + 0 filtered + 0 evicted + 30 failed + 50 unused + 0 pending" in one_line(ended, Pace())


def test_a_run_that_is_resumed_is_shown_from_where_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for elapsed, committed in ((0.0, 0), (1.0, 40)):  # what the log says before the learner has gone back to its checkpoint
        progress.update(replace(NOW, elapsed_s=elapsed, committed=committed, starting=True))
    old = {20: record(20, samples=1000.0)}
    progress.update(replace(NOW, elapsed_s=5.0, committed=20, steps=old))
    progress.update(replace(NOW, elapsed_s=25.0, committed=30, steps=old | {30: record(30, samples=500.0)}))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 20/100 · time 0m 05s elapsed, – left, – samples/s")
    assert second.startswith("step 30/100 · time 0m 25s elapsed, 2m 20s left, 25 samples/s")


@pytest.mark.parametrize("live", [False, True])
def test_a_terminal_that_is_gone_ends_no_run(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def isatty(self) -> bool:
            return live

    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        progress = Progress()
        progress.update(START)
        progress.update(NOW)
        progress.close()


def test_before_the_first_step_there_are_no_figures_yet() -> None:
    new = RunSummary(name="sums", elapsed_s=1.0, total_steps=10)
    for text in ("\n".join(drawn(new, Pace())), one_line(new, Pace())):
        assert "– left" in text
        assert not any(label in text for label in ("reward", "held-out", "lag", "groups", "busy"))


def test_one_line_holds_the_same() -> None:
    assert one_line(NOW, pace(START, NOW)) == (
        "step 40/100 · time 0m 30s elapsed, 1m 00s left, 100 samples/s · reward 0.671 · held-out 0.480 → 0.810 · "
        "response 5.25 tokens · lag 0:25% 1:75% · "
        "groups 400 = 320 trained + 30 filtered + 4 evicted + 6 failed + 40 pending · "
        "restarts generator ×1 · busy generator:75% learner:50%"
    )


def test_plain_lines_come_every_five_seconds_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()  # no terminal
    for second in range(100):
        step = min(second, 11)  # then nothing moves
        progress.update(RunSummary(name="sums", elapsed_s=float(second), committed=step, total_steps=100))
    progress.close()
    progress.close()
    shown = [line.partition(" ·")[0] + line.rpartition(" elapsed")[0][-7:] for line in capsys.readouterr().err.splitlines()]
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


def test_rates_span_the_last_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for second in range(0, 121, 10):
        samples = 1000 if second < 60 else 1000 + (second - 60) * 7  # a slow start does not count for ever
        steps = {second: record(second, samples=float(samples))}
        progress.update(RunSummary(name="sums", elapsed_s=float(second), committed=second, total_steps=1000, steps=steps))
    assert " 7.0 samples/s" in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_gets_a_live_view(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress()
    progress.update(START)
    progress.update(NOW)
    progress.close()
    assert "40/100" in stream.getvalue()
    assert "400 = 320 trained" in stream.getvalue()
    assert capsys.readouterr().out == ""


def test_lines_of_a_warm_start_come_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = WarmStartLines()
    lines(0, 4, {"heldout/loss": 2.0})
    for step in range(1, 5):
        lines(step, 4, {"train/loss": 1.0 / step, "train/tokens": 10.0, **({"heldout/loss": 1.5} if step == 4 else {})})
    assert [line.split(" learned")[0].rpartition(" · ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 1/4 · loss 1 · held-out 2",
        "step 4/4 · loss 0.25 · held-out 2 → 1.5",
    ]


def test_in_a_notebook_one_output_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython is no dependency: this stands for the one that runs the notebook."""
    drawn: list[str] = []

    class Output:
        def update(self, view: object) -> None:
            drawn.append("anew")

    def display(view: object, *, display_id: bool) -> Output:
        assert "text/html" in view._repr_mimebundle_([], [])  # type: ignore[attr-defined]
        drawn.append("first")
        return Output()

    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("asyncrl.report.progress.in_notebook", lambda: True)
    progress = Progress()
    for run in (START, NOW, replace(NOW, elapsed_s=30.5), replace(NOW, elapsed_s=31.5)):
        progress.update(run)
    progress.close()
    assert drawn == ["first", "anew", "anew"]


def test_a_run_of_episodes_says_how_they_go() -> None:
    figures = {
        "num_turns/mean": 2.4,
        "num_turns/max": 8.0,
        "tools/call_frequency": 1.5,
        "tools/failure_frequency": 0.04,
        "episode/environment_s": 0.25,
        "episode/engine_s": 1.5,
        "episode/stop/done": 0.9,
        "episode/stop/max_turns": 0.1,
        "episode/stop/deadline": 0.0,
    }
    run = replace(NOW, steps={40: record(40, **figures)})
    assert (
        " · episodes 2.4 turns (8 at most), 1.5 calls of tools (4% failed), 0.25 s outside and 1.5 s in the engine · "
        "stopped done:90% max_turns:10% · "
    ) in one_line(run, Pace())
    assert not {"episodes", "stopped"} & {*one_line(NOW, Pace()).split()}
