"""A server's process goes with all that it started, however its owner ends, and its death shows."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncrl.errors import ConfigError
from asyncrl.generate.sglang.process import ServerProcess, free_port, require_command
from asyncrl.processes import OwnedProcess

WAIT_S = 20.0
# Starts a process, which starts another one; each says so, and stays.
FAMILY = "sh -c 'echo inner $$; sleep 600; true' & echo outer $$; sleep 600; true"

OWNER = """
import sys
from pathlib import Path
from asyncrl.generate.sglang.process import ServerProcess
server = ServerProcess(("sh", "-c", sys.argv[2]), env={}, log=Path(sys.argv[1]))
print("started", flush=True)
sys.stdin.read()
"""

# Has a child, and does not look after it.
NEGLECTFUL = """
import subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
threading.Event().wait()
"""


def until(condition: Callable[[], bool]) -> None:
    """Polls what nothing announces."""
    pause, passed = threading.Event(), 0.0
    while not condition():
        assert passed < WAIT_S, "it never came true"
        pause.wait(0.02)
        passed += 0.02


def gone(pid: int) -> bool:
    """Whether a process has ended; a reaped one and one that waits to be are both."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


Start = Callable[..., ServerProcess]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


@pytest.fixture
def start(log: Path) -> Iterator[Start]:
    """start(shell script): killed at the end of the test."""
    started = []

    def run(script: str, **env: str) -> ServerProcess:
        started.append(ServerProcess(("sh", "-c", script), env=env, log=log))
        return started[-1]

    yield run
    for server in started:
        server.kill()


def family(log: Path) -> list[int]:
    until(lambda: len(log.read_text().splitlines()) >= 2)
    return [int(line.split()[1]) for line in log.read_text().splitlines()]


def test_kill_ends_it_and_all_that_it_started(start: Start, log: Path) -> None:
    server = start(FAMILY)
    members = family(log)
    assert server.alive()
    assert set(members) < set(server.pids())
    server.kill()
    until(lambda: all(gone(pid) for pid in members))
    assert not server.alive()
    server.kill()  # once more does no harm


def test_it_ends_when_its_owner_is_killed(log: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(log), FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdin is not None
    assert owner.stdout is not None
    with owner.stdin, owner.stdout:
        assert owner.stdout.readline() == b"started\n"
        members = family(log)
        assert not any(gone(pid) for pid in members)
        owner.send_signal(signal.SIGKILL)
        owner.wait(WAIT_S)
    until(lambda: all(gone(pid) for pid in members))


@pytest.mark.parametrize("which", [0, 1])
def test_it_ends_when_its_guard_is_killed(start: Start, log: Path, which: int) -> None:
    """Ray kills the direct children of a worker that exits."""
    server = start(FAMILY)
    members = family(log)
    os.kill(server.pids()[which], signal.SIGKILL)
    if which == 0:  # the inner process of the guard needs nobody's help
        until(lambda: all(gone(pid) for pid in members))
    until(lambda: not server.alive())
    server.kill()
    until(lambda: all(gone(pid) for pid in members))


def test_when_the_command_ends_its_children_go_and_the_log_says_how(start: Start, log: Path) -> None:
    server = start("sleep 600 & echo child $!; echo why it failed; exit 3")
    until(lambda: not server.alive())
    child = int(log.read_text().splitlines()[0].split()[1])
    until(lambda: gone(child))
    assert "why it failed" in server.log_tail()
    until(lambda: "ended with exit code 3" in server.log_tail())


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crashed_process_under_it_is_noticed_at_once_though_nobody_reaps_it(log: Path, signal_number: int) -> None:
    server = ServerProcess((sys.executable, "-c", NEGLECTFUL, "sleep", "600"), env={}, log=log)
    until(lambda: bool(log.read_text().strip()))
    assert server.alive()
    child = int(log.read_text())
    os.kill(child, signal_number)
    until(lambda: gone(child))
    assert not server.alive()
    server.kill()


def test_a_process_that_nobody_reaps_has_not_crashed_if_it_ended_by_itself(log: Path) -> None:
    server = ServerProcess((sys.executable, "-c", NEGLECTFUL, "false"), env={}, log=log)
    until(lambda: bool(log.read_text().strip()) and gone(int(log.read_text())))
    assert server.alive()
    server.kill()


class Unkillable(ServerProcess):
    """A process that waits for a device: the kernel does not end it, whatever it is sent."""

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "whoever waits for it waits for ever"
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_nobody_waits_without_bound_for_a_killed_process(log: Path) -> None:
    server = Unkillable(("sleep", "600"), env={}, log=log)
    server.kill()
    server.kill()
    assert OwnedProcess.wait(server, WAIT_S) == -signal.SIGKILL  # for this test alone


def test_a_process_that_ends_in_good_order_is_no_crash(start: Start, log: Path) -> None:
    server = start("i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done; echo done; sleep 600; true")
    until(lambda: bool(log.read_text()) or not server.alive())
    assert server.alive()


def test_the_tail_of_the_log_is_of_this_process_only(start: Start, log: Path) -> None:
    log.write_text("of the one before\n")
    server = start("seq 1 100; exit 1")
    until(lambda: "ended with exit code" in server.log_tail())
    until(lambda: not server.alive())  # the guard writes before it kills
    lines = server.log_tail().splitlines()
    assert len(lines) == 15
    assert lines[-2] == "100"
    assert lines[-1].endswith("sh ended with exit code 1")
    other = start("echo another; exit 1")
    until(lambda: not other.alive())
    assert other.log_tail().splitlines()[0] == "another"


def test_env_is_added_and_stdin_is_empty(start: Start, log: Path) -> None:
    server = start('cat; echo "$ASYNCRL_TEST in $PATH"; exit 0', ASYNCRL_TEST="seen")
    until(lambda: not server.alive())
    assert server.log_tail().splitlines()[0] == f"seen in {os.environ['PATH']}"


def test_python_is_the_one_that_runs_asyncrl(log: Path) -> None:
    server = ServerProcess(("python", "-c", "import sys; print(sys.executable)"), env={}, log=log)
    until(lambda: not server.alive())
    server.kill()
    assert server.log_tail().splitlines()[0] == sys.executable


def test_an_unknown_command_has_died_and_says_why(log: Path) -> None:
    server = ServerProcess(("no-such-command-anywhere",), env={}, log=log)
    until(lambda: not server.alive())
    server.kill()
    assert "No such file or directory: 'no-such-command-anywhere'" in server.log_tail()


def test_require_command_says_what_to_install() -> None:
    require_command(("sh",))
    require_command(("python", "-m", "whatever"))
    with pytest.raises(ConfigError, match=r"'no-such-command-anywhere' is not on PATH.*install"):
        require_command(("no-such-command-anywhere",))


def test_it_leaves_no_file_descriptor(log: Path, descriptors: Callable[[], int]) -> None:
    before = descriptors()
    for _ in range(3):
        ServerProcess(("sh", "-c", "sleep 600"), env={}, log=log).kill()
    with pytest.raises(FileNotFoundError):
        ServerProcess(("sh",), env={}, log=log.parent / "no" / "folder")
    assert descriptors() == before


def test_free_ports_are_apart_from_those_that_are_given_to_connections_and_can_be_bound() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert 20_000 <= min(ports) <= max(ports) < 32_768
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.pop()))
