"""`asyncrl attach`, `status` and `stop` of runs that nobody leads, that are led elsewhere, or that are none."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import msgspec
import pytest

from asyncrl import cli
from asyncrl.control import Stop
from asyncrl.report.summary import RunEnd
from asyncrl.rundir import RunDir

FAILED = RunEnd(time=1.0, status=1, steps=7, checkpoint="c/step_000006", error="learner: broken\nat the end")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    paths = RunDir(tmp_path / "runs" / "one").create()
    paths.recipe.write_text('{"total_steps": 9}')
    return paths


def ended(run: RunDir, end: RunEnd) -> None:
    run.ended.write_bytes(msgspec.json.encode(end))


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (None, 1, "is led by nobody, and nobody said how it ended: whatever led it was killed"),
        (FAILED, 1, "failed after 7 updates; the newest checkpoint is c/step_000006\nerror: learner: broken\nat the end"),
        (RunEnd(time=1.0, status=130, steps=7), 130, "was stopped after 7 updates"),
        (RunEnd(time=1.0, status=2, steps=0, error="no"), 2, "failed after 0 updates\nerror: no"),
        (RunEnd(time=1.0, status=0, steps=9), 0, "is done, after 9 updates"),
    ],
)
def test_what_ended_is_told_with_its_exit_status(
    run: RunDir, end: RunEnd | None, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if end is not None:
        ended(run, end)
    assert cli.main(["attach", str(run.path)]) == status
    assert capsys.readouterr().err == f"{run.path} {said}\n"
    assert cli.main(["stop", str(run.path)]) == 0, "what has ended is stopped"
    assert capsys.readouterr().out == f"{run.path} {said}\n"


def test_a_stopped_run_says_how_to_go_on(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.checkpoint(6).mkdir()
    ended(run, FAILED)
    assert cli.main(["stop", str(run.path)]) == 0
    way = capsys.readouterr().out.splitlines()[-1]
    runs = run.path.parent
    assert way == (f"to go on: asyncrl run {run.recipe} --deploy {run.deployment} --name one --runs-dir {runs} --resume")


def test_status_of_a_folder_of_runs(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    ended(run, FAILED)
    (run.path.parent / "no-run").mkdir()
    other = RunDir(run.path.parent / "two").create()
    now = time.time()
    other.recipe.write_text('{"total_steps": 9}')
    (other.path / ".lock").write_text("pid 5 on elsewhere\n")
    os.utime(other.path / ".lock", (now - 60, now - 60))
    step = {"sequence": 1, "kind": "step", "incarnation": 0, "samples": 8, "reward/mean": 0.5}
    actors = {"kind": "actors", "learner/busy_s": 1.0, "generator-0/busy_s": 2, "generator-1/busy_s": 2, "learner/restarts": 3}
    lines = [step | {"time": now - 4 + i, "step": i, "sequence": i} for i in (1, 2, 3)] + [actors | {"time": now, "step": 3}]
    other.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (other.logs / "learner.error").write_text("Traceback\nValueError: no\n")
    assert cli.main(["status", str(run.path.parent)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "one: failed",
        "  update 0/9 · – samples/s",
        "  error       learner: broken … at the end",
        "",
        "two: running, led by pid 5 on elsewhere for 1m 00s",
        "  update 3/9 · 8.0 samples/s · reward 0.5, heard 0 s ago",
        "  members     generator ×2, learner ×1, store ×1",
        "  restarts    learner ×3",
        "  error       learner: ValueError: no",
    ]
    assert cli.main(["status", str(run.path), str(other.path), "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["run"], first["state"], first["error"]) == (str(run.path), "failed", "learner: broken\nat the end")
    assert (second["state"], second["samples_per_s"], second["restarts"]) == ("running", pytest.approx(8.0), {"learner": 3})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attach", "none"], "none is no run directory: it holds no recipe.json; name the folder of a run, runs/NAME"),
        (["stop", "none"], "none is no run directory"),
        (["stop", "none", "--timeout", "0"], "--timeout 0: say how many seconds > 0 to wait"),
        (["status", "none"], "none is neither a run directory nor a folder of runs; name one, such as runs or runs/NAME"),
        (["scale", "none", "generators=2"], "none is no run directory"),
        (["scale", "none", "learners=2"], "'learners=2': expected each of generators=N, rewards=N, learner=N at most once"),
        (["scale", "none", "generators=-1"], "'generators=-1': expected each of"),
        (["scale", "none", "generators=1", "generators=2"], "'generators=2': expected each of"),
        (["status"], "runs is neither a run directory nor a folder of runs"),
    ],
)
def test_what_is_no_run_is_named(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_a_leader_that_does_not_answer_fails_a_stop(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with run.lock():
        assert cli.main(["stop", str(run.path), "--timeout", "0.2"]) == 1
    assert "nothing was done: pid " in capsys.readouterr().err


@pytest.mark.parametrize(("words", "wanted"), [([], Stop()), (["--now"], Stop(at_once=True))])
def test_what_a_stop_asks_for(
    run: RunDir, words: list[str], wanted: Stop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Stop] = []
    ended(run, FAILED)
    with contextlib.ExitStack() as leading:
        leading.enter_context(run.lock())

        def answer(paths: RunDir, request: Stop, timeout_s: float) -> str:
            asked.append(request)
            leading.close()
            (run.path / ".lock").unlink()
            return "so be it"

        monkeypatch.setattr("asyncrl.jobs.stop.ask", answer)
        assert cli.main(["stop", str(run.path), *words]) == 0
    assert asked == [wanted]
    assert capsys.readouterr().err == f"pid {os.getpid()} on {socket.gethostname()}: so be it\n"
