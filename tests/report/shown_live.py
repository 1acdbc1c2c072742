"""What tests/report/test_terminal.py runs at a terminal: a shell's part, which starts a program that shows a run as it is told.

Orders come in on one descriptor, a line each; what was done is told on another, when it is written to the terminal.
"""

import logging
import os
import signal
import sys
import termios
from contextlib import closing
from types import SimpleNamespace
from typing import Any

from asyncrl.report.progress import Progress
from asyncrl.report.summary import RunSummary
from asyncrl.rundir import log_shown
from asyncrl.types import GroupCounts, Record, Report, Version

ORDERS, DONE = map(int, sys.argv[1:3]) if __name__ == "__main__" else (-1, -1)
SAMPLE = SimpleNamespace(name="7/0/1", status="ok", reward=0.5, length=3, lag=2, prompt="1+1=", response="two\nlines")


def run_at(update: int, generators: int = 2) -> RunSummary:
    """A run of 200 updates, a second each."""
    figures = {
        "samples": 50.0,
        "reward/mean": update / 200,
        "response_length/mean": 5.25,
        "staleness/lag_0": 0.25,
        "staleness/lag_1": 0.75,
        "staleness/lag_mean": 0.75,
        "gap/logprob_mean_abs": 2e-7,
    }

    def record(step: int, kind: str, **metrics: float) -> Record:
        return Record(sequence=step, time=0.0, kind=kind, version=Version(1, step), metrics=metrics)  # type: ignore[arg-type]

    seconds = {"busy": 0.6 * update, "wait:store": 0.3 * update, "sync": 0.1 * update}
    names = ["learner", "store", "reward-0", *(f"generator-{i}" for i in range(generators))]
    return RunSummary(
        name="sums",
        total_steps=200,
        elapsed_s=float(update),
        committed=update,
        steps={step: record(step, "step", **figures) for step in (update - 1, update)},
        evals={0: record(0, "eval", **{"eval/score": 0.25})},
        counts=GroupCounts(reserved=update + 8, trained=update, pending=8),
        settled={"samples": 50.0 * update},
        reports={name: Report(name=name, role=name, seconds=seconds, gauges={}) for name in names},
        restarts={"generator-1": 1},
    )


def tell(text: str) -> None:
    os.write(DONE, f"{text}\n".encode())


def echoes() -> str:
    flags = termios.tcgetattr(0)[3]
    return "as it was" if flags & termios.ECHO and flags & termios.ICANON else "taken"


def shell() -> None:
    """Has the program in the foreground; says when it is stopped or ended, and how the terminal is then."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        program()
        sys.exit(0)
    os.setpgid(child, child)
    os.tcsetpgrp(0, child)
    tell(f"pid {child}")
    while True:
        _, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            tell(f"ended {os.waitstatus_to_exitcode(status)}, {echoes()}")
            return
        tell(f"stopped, {echoes()}")
        assert os.read(ORDERS, 64) == b"go on\n"
        os.tcsetpgrp(0, child)
        tell("going on")
        os.killpg(child, signal.SIGCONT)


def program() -> None:
    def interrupted(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    orders = os.fdopen(ORDERS, closefd=False)
    with log_shown(), closing(Progress(lambda: [SAMPLE])) as progress:
        try:
            for order in iter(orders.readline, ""):
                what, _, rest = order.strip().partition(" ")
                if what == "update":
                    progress.update(run_at(int(rest)))
                elif what == "log":
                    logging.getLogger("asyncrl.test").info("%s", rest)
                elif what == "print":
                    print(rest)
                elif what == "end":
                    break
                tell(f"{what}, {echoes()}")
        except KeyboardInterrupt:
            tell("interrupted")


if __name__ == "__main__":
    shell()
