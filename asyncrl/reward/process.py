"""One scoring process: `python -m asyncrl.reward.process TERMS LIFELINE_FD`, started by `Scorer` and by nobody else.

TERMS: the reward terms as JSON. Samples come in on the first standard input, verdicts leave on the first standard output; both
are then moved away, so that what the user's function prints goes to standard error, and cannot break a frame.
"""

import fcntl
import os
import signal
import sys
import threading

import msgspec

from asyncrl.config import RewardTerm
from asyncrl.errors import ConfigError
from asyncrl.reward.frames import Broken, FrameReader, Ready, Verdict, frame, samples
from asyncrl.reward.functions import Judge, load_terms


def main(terms: str, lifeline: int) -> int:
    _die_with_parent(lifeline)
    tasks, results = _private_pipes()
    try:
        judge = load_terms(msgspec.json.decode(terms, type=tuple[RewardTerm, ...]))
    except ConfigError as error:
        _write(results, frame(Broken(str(error))))
        return 1
    _write(results, frame(Ready()))
    _serve(judge, tasks, results)
    return 0


def _serve(judge: Judge, tasks: int, results: int) -> None:
    """Scores until the pool closes its end."""
    reader = FrameReader()
    while data := os.read(tasks, 1 << 16):
        for body in reader.feed(data):
            for sample in samples(body):
                verdict = judge(sample)
                # An alarm that the function left running would hit the next sample.
                signal.setitimer(signal.ITIMER_REAL, 0)
                _write(results, _encoded(verdict))


def _encoded(verdict: Verdict) -> bytes:
    try:
        return frame(verdict)
    except (UnicodeEncodeError, TypeError) as error:  # e.g. a lone surrogate in the error's text
        return frame(Verdict("invalid", error=f"the verdict could not be encoded: {error!a}"))


def _die_with_parent(lifeline: int) -> None:
    """Nothing is ever written to the lifeline; its end means that the pool's process is gone, however it went.

    A thread waits for that. Where a C function holds the GIL for ever (a catastrophic regular expression), the
    thread can't run: so Linux is also asked to signal our process group by itself.
    """

    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    os.set_inheritable(lifeline, False)
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _private_pipes() -> tuple[int, int]:
    tasks, results = os.dup(0), os.dup(1)  # dup'ed descriptors are not inherited by the user's own subprocesses
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return tasks, results


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
