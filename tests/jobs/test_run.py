"""`asyncrl run` without a run: the signals that end one, and the command that goes on."""

import argparse
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncrl.jobs.run import _words


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What `asyncrl run` does with signals, without a run; it stays until it is killed.
SIGNALS = """
import signal, sys, time
from asyncrl.jobs import run

run._at_interrupt(run._end_in_order)
try:
    open(sys.argv[1], "w").close()
    while True:
        time.sleep(0.01)
except KeyboardInterrupt:
    print("and so it did", file=sys.stderr, flush=True)
    signal.raise_signal(signal.SIGHUP)
    open(sys.argv[1] + ".ended", "w").close()
"""


def test_a_terminal_that_closes_ends_a_run_in_order(tmp_path: Path) -> None:
    mark, (terminal, device) = tmp_path / "mark", pty.openpty()
    ended = tmp_path / "mark.ended"
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-c", SIGNALS, str(mark)], stdin=device, stdout=device, stderr=device
    )
    os.close(device)
    until(mark.exists)
    os.close(terminal)
    assert process.wait(60) == 0
    assert ended.exists()


def test_nohup_stays_in_force(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", SIGNALS, str(mark)], stderr=subprocess.PIPE, stdin=subprocess.PIPE
    )
    until(mark.exists)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert told.decode().splitlines()[-2:] == ["interrupted: ending in order; once more ends at once", "and so it did"]


@pytest.mark.parametrize(
    ("options", "resume", "words"),
    [
        ({}, False, "run r.py a.b=c"),
        ({}, True, "run r.py a.b=c --resume"),
        (
            {"deploy": "d.yaml", "name": "x", "runs_dir": "/data"},
            0,
            "run r.py a.b=c --deploy d.yaml --name x --runs-dir /data --resume 0",
        ),
    ],
)
def test_the_same_run_in_words(options: dict[str, str], resume: bool | int, words: str) -> None:
    args = argparse.Namespace(**{"deploy": None, "name": "", "runs_dir": "runs"} | options)
    assert " ".join(_words(args, "r.py", ["a.b=c"], resume)) == words
