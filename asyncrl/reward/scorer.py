"""The pool's handle on one scoring process: send, read, and kill with everything it started."""

import selectors
import signal
import socket
import time
from collections import deque
from typing import Generic, TypeVar

from msgspec.structs import replace

from asyncrl.errors import ConfigError
from asyncrl.forks import LONGEST, Broken, Died, Loaded, died
from asyncrl.reward.process import take_replies, to_frame
from asyncrl.reward.results import Sample, Verdict

T = TypeVar("T")


class Scorer(Generic[T]):
    """One scoring process, at the other end of `peer`. Owned by one thread; never blocks.

    flight: the samples that it was given and has not scored, in order; it scores the first, since `since` (monotonic seconds).
    """

    def __init__(self, number: int, peer: socket.socket, selector: selectors.BaseSelector) -> None:
        self._number = number  # in the pool, also of what replaces it
        self.flight: deque[tuple[T, Sample]] = deque()
        self.since = time.monotonic()
        self.ready = False
        self.code: int | None = None  # how the process ended
        self.lost = ""  # why nothing more will come, once that is so
        self.mean_s = float("inf")  # running mean of seconds per sample; unknown before the first
        self._peer, self._selector = peer, selector
        self._received = bytearray()
        self._unsent = memoryview(b"")
        peer.setblocking(False)
        selector.register(peer, selectors.EVENT_READ, self)

    @property
    def idle(self) -> bool:
        return self.ready and not self.flight and not self.lost

    def send(self, batch: list[tuple[T, Sample]]) -> None:
        """Gives an idle process samples to score; the first one's clock starts now."""
        self.flight.extend(batch)
        self.since = time.monotonic()
        self._unsent = memoryview(to_frame([sample for _, sample in batch]))
        self._selector.modify(self._peer, selectors.EVENT_READ | selectors.EVENT_WRITE, self)
        self.flush()

    def flush(self) -> None:
        """Writes what the socket takes; the selector tells when it takes more."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._peer.send(self._unsent) :]
        except BlockingIOError:
            return
        except ConnectionError:  # it died, as `read` will say
            self._unsent = memoryview(b"")
        self._selector.modify(self._peer, selectors.EVENT_READ, self)

    def read(self) -> list[tuple[T, Verdict]]:
        """The verdicts that have arrived. Raises ConfigError if the function can't be loaded."""
        verdicts: list[tuple[T, Verdict]] = []
        try:
            more = self._receive()
            for reply in take_replies(self._received):
                if isinstance(reply, Broken):
                    raise ConfigError(reply.error)
                if isinstance(reply, Verdict):
                    verdicts.append((self.flight.popleft()[0], reply))
                else:
                    self.ready |= isinstance(reply, Loaded)
                    self.code = reply.code if isinstance(reply, Died) else None
            if not more and self.code is None:
                self.code = -signal.SIGKILL
            if self.code is not None:
                self.lost = died(self.code)
        except (ValueError, IndexError) as error:  # IndexError: more verdicts than samples
            self.lost = f"the process sent what can't be read: {error}"
        if not verdicts:
            return []
        each = (time.monotonic() - self.since) / len(verdicts)
        self.mean_s = each if self.mean_s == float("inf") else 0.7 * self.mean_s + 0.3 * each
        return [(tag, self.timed(verdict, each)) for tag, verdict in verdicts]

    def timed(self, verdict: Verdict, took_s: float) -> Verdict:
        """With what it took since `since`, which moves on by that: so much for each of several that came together."""
        began = time.time() - time.monotonic() + self.since
        self.since += took_s
        return replace(verdict, scoring=(self._number, began, began + took_s))

    def _receive(self) -> bool:
        """Whether more may come, after what has."""
        try:
            while data := self._peer.recv(1 << 20):
                self._received += data
                if len(self._received) > 2 * LONGEST:
                    return True
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False

    def kill(self) -> None:
        """Idempotent."""
        if self._peer.fileno() >= 0:
            self._selector.unregister(self._peer)
            self._peer.shutdown(socket.SHUT_RDWR)
            self._peer.close()
