"""The pool's handle on one scoring process: spawn, send, read, and kill with everything it started."""

import contextlib
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
from asyncrl.processes import OwnedProcess
from asyncrl.reward.process import Broken, Ready, take_replies, to_frame
from asyncrl.reward.results import Sample, Verdict

T = TypeVar("T")


class Scorer(OwnedProcess, Generic[T]):
    """One scoring process. Owned by one thread; never blocks, but for the reaping in `kill`.

    terms: the reward terms as JSON, for its command line. flight: the samples that it was given and has not scored, in order;
    it scores the first, since `since` (monotonic seconds).
    """

    def __init__(self, terms: str, log: Path | None, selector: selectors.BaseSelector) -> None:
        self.flight: deque[tuple[T, Sample]] = deque()
        self.since = time.monotonic()
        self.ready = False
        self.mean_s = float("inf")  # running mean of seconds per sample; unknown before the first
        self._selector = selector
        self._received = bytearray()
        self._unsent = memoryview(b"")
        command = [sys.executable, "-m", "asyncrl.reward.process", terms]
        with open(log, "ab") if log else contextlib.nullcontext() as output:
            super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output)
        assert self.stdin is not None
        assert self.stdout is not None
        self._tasks, self._results = self.stdin.fileno(), self.stdout.fileno()
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
        self._unsent = memoryview(to_frame([sample for _, sample in batch]))
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
        self._unregister(self._tasks)

    def read(self) -> list[tuple[T, Verdict]]:
        """The verdicts that have arrived. Raises ConfigError if the function can't be loaded."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._results, 1 << 16):
                self._received += data
        verdicts: list[tuple[T, Verdict]] = []
        for reply in take_replies(self._received):
            if isinstance(reply, Broken):
                raise ConfigError(reply.error)
            if isinstance(reply, Ready):
                self.ready = True
            else:
                verdicts.append((self.flight.popleft()[0], reply))
        if verdicts:
            now = time.monotonic()
            each = (now - self.since) / len(verdicts)
            self.mean_s = each if self.mean_s == float("inf") else 0.7 * self.mean_s + 0.3 * each
            self.since = now
        return verdicts

    def kill(self) -> None:
        self._unregister(self._tasks)
        self._unregister(self._results)
        super().kill()

    def _unregister(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)


def died(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"process died: exit code {code}"
    named = {number.value: number.name for number in signal.Signals}
    return f"process died: {named.get(-code, f'signal {-code}')}"
