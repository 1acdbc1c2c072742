"""The pool's handle on one scoring process: spawn, feed, read, and kill with everything it started."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Generic, TypeVar

from asyncrl.errors import ConfigError
from asyncrl.reward.frames import Broken, FrameReader, Ready, Sample, Verdict, frame, reply

T = TypeVar("T")


class Scorer(Generic[T]):
    """One process in a session of its own. Owned by one thread; never blocks, but for the reaping of a killed process.

    terms: the reward terms as JSON, for its command line. `flight`: what it was given and has not answered, in order; it
    scores the first, since `since` (monotonic seconds).
    """

    def __init__(self, terms: str, log: Path | None, selector: selectors.BaseSelector) -> None:
        self.flight: deque[tuple[T, Sample]] = deque()
        self.since = time.monotonic()
        self.ready = False
        self.mean_s = float("inf")  # running mean of seconds per sample; unknown before the first
        self._selector = selector
        self._reader = FrameReader()
        self._unsent = memoryview(b"")
        lifeline, self._lifeline = os.pipe()
        output = open(log, "ab") if log else None  # noqa: SIM115  # closed below, once the process has its own
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asyncrl.reward.process", terms, str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)
            if output:
                output.close()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._results = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._tasks, False)
        os.set_blocking(self._results, False)
        selector.register(self._results, selectors.EVENT_READ, self)

    @property
    def idle(self) -> bool:
        return self.ready and not self.flight

    def send(self, batch: list[tuple[T, Sample]]) -> None:
        """Gives an idle process samples to score; the first one's clock starts now."""
        self.flight.extend(batch)
        self.since = time.monotonic()
        self._unsent = memoryview(frame([sample for _, sample in batch]))
        self._selector.register(self._tasks, selectors.EVENT_WRITE, self)
        self.flush()

    def flush(self) -> None:
        """Writes what the pipe takes; the selector tells when it takes more."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._tasks, self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # died; `exit_code` will say how
            self._unsent = memoryview(b"")
        if self._tasks in self._selector.get_map():
            self._selector.unregister(self._tasks)

    def read(self) -> list[tuple[T, Verdict]]:
        """The verdicts that have arrived. Raises ConfigError if the function can't be loaded."""
        verdicts: list[tuple[T, Verdict]] = []
        while data := self._read_some():
            for body in self._reader.feed(data):
                message = reply(body)
                if isinstance(message, Broken):
                    raise ConfigError(message.error)
                if isinstance(message, Ready):
                    self.ready = True
                    continue
                verdicts.append((self.flight.popleft()[0], message))
        if verdicts:
            now = time.monotonic()
            each = (now - self.since) / len(verdicts)
            self.mean_s = each if self.mean_s == float("inf") else 0.7 * self.mean_s + 0.3 * each
            self.since = now
        return verdicts

    def exit_code(self) -> int | None:
        """None while it lives; minus the signal's number if one killed it. Does not reap: its group keeps its name."""
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def kill(self) -> None:
        """SIGKILL to the process and its group, then reaps it and frees the descriptors."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for descriptor in (self._tasks, self._results):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        os.close(self._lifeline)

    def _read_some(self) -> bytes:
        try:
            return os.read(self._results, 1 << 16)
        except BlockingIOError:
            return b""


def died(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"process died: exit code {code}"
    try:
        return f"process died: {signal.Signals(-code).name}"
    except ValueError:
        return f"process died: signal {-code}"
