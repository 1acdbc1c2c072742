"""A run without its terminal, as `asyncrl run --detach` starts one; here a small program stands for the run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.jobs.detach import detach
from asyncrl.rundir import RunDir

# `--ready FD` is the end of its command line; it stays until a file is there, a minute at most.
RUN = """
import os, sys, time
from asyncrl.jobs.detach import tell_ready

print("a result", flush=True)
print("it starts", file=sys.stderr, flush=True)
{then}
until = time.monotonic() + 60
while not os.path.exists({gate!r}) and time.monotonic() < until:
    time.sleep(0.01)
print("it ended in session", os.getsid(0), flush=True)
"""
READY = "tell_ready(int(sys.argv[-1]))"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def program(tmp_path: Path, then: str) -> list[str]:
    return [sys.executable, "-c", RUN.format(then=then, gate=str(tmp_path / "gate"))]


def test_a_detached_run_goes_on_in_a_session_of_its_own(run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert detach(program(tmp_path, READY), run) == 0
    told = capfd.readouterr()
    assert told.err == "a result\nit starts\n"
    pid = told.out.splitlines()[1].removeprefix("pid     ")
    assert told.out.splitlines() == [
        f"run     {run.path}",
        f"pid     {pid}",
        f"log     {run.path}/driver.log",
        f"follow  asyncrl attach {run.path}",
        f"stop    asyncrl stop {run.path}    (in order, with a checkpoint)",
    ]
    (tmp_path / "gate").touch()
    os.waitpid(int(pid), 0)
    assert run.driver_log.read_text() == f"a result\nit starts\nit ended in session {pid}\n"


def test_what_fails_at_the_start_is_told_with_its_exit_status(
    run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run.create(run.path)
    run.driver_log.write_text("of an earlier start\n")
    assert detach(program(tmp_path, "sys.exit('error: no such model')"), run) == 1
    assert capfd.readouterr() == ("", "a result\nit starts\nerror: no such model\n")
    assert run.driver_log.read_text().startswith("of an earlier start\na result\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_it_is_up_ends_it(run: RunDir, tmp_path: Path, number: signal.Signals) -> None:
    script = "import signal, sys; from asyncrl.jobs.detach import detach; from asyncrl.rundir import RunDir\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += f"detach({program(tmp_path, '')!r}, RunDir({str(run.path)!r}))"
    waiting = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    assert waiting.stderr is not None
    assert waiting.stderr.readline() == b"a result\n"
    waiting.send_signal(number)
    _, rest = waiting.communicate(timeout=60)
    assert waiting.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in rest
    assert "it ended" not in run.driver_log.read_text()
