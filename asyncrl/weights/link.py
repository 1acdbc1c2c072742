"""A subscriber's way to the publisher: finds it, says hello, notices its silence, finds its successor."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import zmq
from msgspec.structs import replace

from asyncrl.errors import BadTransfer, Unavailable
from asyncrl.weights import messages
from asyncrl.weights.messages import Announce, Bye, Hello, Reply, Request
from asyncrl.weights.sockets import GOODBYE_MS, Address, SubscriberSocket, Waker

Resolve = Callable[[], Address | None]

REDISCOVER_POLLS = 10  # also a publisher that answers may have been superseded: look every so many polls
BATCH = 64
SILENT = "it does not answer"


class Link:
    """One connection at a time. Says `Hello` every `poll_s`; a Hello without an answer makes it call `resolve()` again.

    Silence counts from the first unanswered Hello, and only while the link is in use: a busy caller is not a dead peer.
    Not thread-safe: all calls but `waker.set` come from one thread at a time.
    """

    def __init__(
        self,
        resolve: Resolve,
        *,
        name: str,
        poll_s: float,
        deadline_s: float,
        poller: zmq.Poller | None = None,
    ) -> None:
        """name: who says Hello, in errors. poller: of another link, whose `receive` then waits for this one too."""
        self._moved: Callable[[], bool] = getattr(resolve, "moved", lambda: True)
        self._resolve, self._name, self._poll_s, self._deadline_s = resolve, name, poll_s, deadline_s
        self.waker = Waker()
        self.hello = 0  # number of the last Hello
        self.connections = 0
        self.confirms = 0  # number of the last bucket that came on this connection
        self.address: Address | None = None
        self._client: SubscriberSocket | None = None
        self.poller = poller or zmq.Poller()
        self.poller.register(self.waker.fileno(), zmq.POLLIN)
        self._due = self._rediscover_at = self._left_at = time.monotonic()
        self._silent_since: float | None = None
        self._cause = "no publisher was looked for yet"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around each call of the user: time between calls, beyond one poll, doesn't count as silence."""
        away = time.monotonic() - self._left_at - self._poll_s
        if self._silent_since is not None and away > 0:
            self._silent_since += away
        try:
            yield
        finally:
            self._left_at = time.monotonic()

    def keep(self, hello: Hello) -> bool:
        """Does what is due: looks for the publisher, says Hello. Returns True if it is another publisher than before.

        Raises Unavailable after `deadline_s` of silence; the next call starts afresh.
        """
        now = time.monotonic()
        if self._silent_since is not None and now - self._silent_since > self._deadline_s:
            silence, self._silent_since = now - self._silent_since, None
            where = self.address.endpoint if self.address else "no address"
            raise Unavailable(
                f"weight publisher ({where}): {self._name} has heard nothing for {silence:.1f} s "
                f"(deadline_s={self._deadline_s:g}); last cause: {self._cause}; see why the learner is down, or allow more time"
            )
        if now < self._due:
            return False
        self._due = now + self._poll_s
        changed = False
        if self._client is None or self._silent_since is not None or (now >= self._rediscover_at and self._moved()):
            self._rediscover_at = now + REDISCOVER_POLLS * self._poll_s
            changed = self._find()
        self.greet(hello)
        return changed

    def greet(self, hello: Hello) -> None:
        """Says Hello, with the next number: tells what we hold and asks what is newest."""
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        self.hello += 1
        self.send(replace(hello, sequence=self.hello, confirms=self.confirms))

    def hurry(self) -> None:
        """Makes the next `keep` say Hello at once."""
        self._due = time.monotonic()

    def wait_s(self, until: float) -> float:
        """Seconds to the next thing that is due, `until` at the latest."""
        return max(0.0, min(until, self._due) - time.monotonic())

    def send(self, request: Request) -> None:
        """Without waiting. Lost if the connection is congested or down: what matters is asked again after the next Hello."""
        if self._client is not None:
            with suppress(zmq.Again):
                self._client.socket.send(messages.encode(request), zmq.NOBLOCK)

    def receive(self, wait_s: float) -> list[tuple[Reply, memoryview | None]]:
        """Replies that are there; waits up to `wait_s` for the first, for trouble, or for the waker. Raises BadTransfer."""
        events = dict(self.poller.poll(int(wait_s * 1000) + (wait_s > 0)))
        if self.waker.fileno() in events:
            self.waker.clear()
        if self._client is None:
            return []
        if self._client.monitor in events:
            self._notice(self._client.trouble())
        replies: list[tuple[Reply, memoryview | None]] = []
        while self._client.socket in events and len(replies) < BATCH:
            try:
                frames = self._client.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            replies.append(self._decode(frames))
        return replies

    def close(self) -> None:
        """Says goodbye, and waits a moment for it to leave."""
        self.send(Bye())
        self._drop(GOODBYE_MS)
        self.poller.unregister(self.waker.fileno())
        self.waker.close()

    def _decode(self, frames: list[zmq.Frame]) -> tuple[Reply, memoryview | None]:
        try:
            reply = messages.decode_reply(frames[0].buffer)
        except messages.UNREADABLE as error:
            raise BadTransfer(f"weight publisher sent what {self._name} can't read: {error}; not used") from error
        # A hint proves a living publisher too, but only an answer proves that our requests get through.
        if self._silent_since is not None and not (isinstance(reply, Announce) and reply.echo == 0):
            self._silent_since, self._cause = None, SILENT
        return reply, frames[1].buffer if len(frames) > 1 else None

    def _notice(self, cause: str) -> None:
        if cause:
            self._cause = cause
            if self._silent_since is None:  # don't wait for the Hello to time out
                self._silent_since = time.monotonic()
                self.hurry()

    def _find(self) -> bool:
        try:
            address = self._resolve()
        except Unavailable as error:
            self._cause = f"resolve() failed: {error}"
            return False
        if address is None:
            self._cause = "resolve() knows of no publisher"
            return False
        former = self.address
        if address == former and not (self._client is not None and self._client.refused):
            return False
        if former is not None and address.incarnation < former.incarnation:
            self._cause = f"resolve() names incarnation {address.incarnation}, older than {former.incarnation}"
            return False
        self._drop()
        self.address, self._client = address, SubscriberSocket(address)
        self.poller.register(self._client.socket, zmq.POLLIN)
        self.poller.register(self._client.monitor, zmq.POLLIN)
        self._cause = SILENT
        self.connections += 1
        self.confirms = 0
        return former is None or not address.same_publisher(former)  # it may have given us other keys

    def _drop(self, linger_ms: int = 0) -> None:
        """Closes the connection, if there is one."""
        if self._client is not None:
            self.poller.unregister(self._client.socket)
            self.poller.unregister(self._client.monitor)
            self._client.close(linger_ms)
            self._client = None
