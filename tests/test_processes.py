"""Children go with their owner, and with all that they started. Guarded commands: tests/generate/sglang/test_process.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncrl.processes import OwnedProcess

# Ends with its owner, has a child that would stay, and tells both pids.
CHILD = """
import os, subprocess, sys, time
from asyncrl.processes import end_with_owner
end_with_owner(int(sys.argv[1]))
print(os.getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""
OWNER = f"""
import sys
from asyncrl.processes import OwnedProcess
child = OwnedProcess([sys.executable, "-c", {CHILD!r}])
sys.stdin.read()
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended; a reaped one and one that waits to be are both."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_child_and_what_it_started_end_with_a_killed_owner() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(gone, pids))
        owner.send_signal(signal.SIGKILL)
    until(lambda: all(map(gone, pids)))


def test_kill_ends_the_group_once_and_for_all() -> None:
    child = OwnedProcess(["sh", "-c", "sleep 600 & echo $!; sleep 600"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    started = int(child.stdout.readline())
    assert child.exit_code() is None
    child.kill()
    child.kill()
    assert child.exit_code() == -signal.SIGKILL
    until(lambda: gone(started))


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -TERM $$", -signal.SIGTERM)])
def test_a_child_that_ended_is_not_reaped_before_it_is_killed(script: str, code: int) -> None:
    child = OwnedProcess(["sh", "-c", script])
    until(lambda: child.exit_code() is not None)
    assert child.exit_code() == code
    assert os.path.exists(f"/proc/{child.pid}")  # so nobody else can have its group's number
    child.kill()
    assert child.exit_code() == code


def test_no_descriptor_is_left(descriptors: Callable[[], int]) -> None:
    before = descriptors()
    OwnedProcess(["sleep", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE).kill()
    with pytest.raises(FileNotFoundError):
        OwnedProcess(["no-such-command-anywhere"])
    assert descriptors() == before


ASIDE = """
import os, sys, time
from functools import partial
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.processes import aside

def refuse():
    raise ConfigError("no such file")

known = [1, 2]
with aside(lambda: (os.getpid(), sum(known))) as result:
    pid, total = result()
assert (pid == os.getpid(), total) == (False, 3)
for work, said in ((refuse, "no such file"), (partial(os._exit, 7), "died: exit code 7; what it printed says why.")):
    try:
        with aside(work) as result:
            result()
    except (ConfigError, Unavailable) as error:
        assert said in f"{error}."
    else:
        sys.exit(f"{work}: nothing was raised")
with aside(partial(time.sleep, 600)):
    pass
os.mkdir("gone")
os.chdir("gone")
os.rmdir("../gone")
try:
    with aside(partial(os._exit, 2)) as result:
        result()
except Unavailable as error:
    assert str(error).endswith("has been deleted; start it in one that stays")
    print("all")
"""


def test_work_aside_returns_or_raises_here_and_is_killed_at_the_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ASIDE], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("all\n", "")
