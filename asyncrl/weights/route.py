"""From whom a receiver takes versions: the publisher, or another receiver that the publisher names, as long as that answers."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from msgspec.structs import replace

from asyncrl.errors import Unavailable
from asyncrl.types import Version
from asyncrl.weights.link import Link
from asyncrl.weights.messages import Hello, RelayAddress, Reply
from asyncrl.weights.sockets import Address

DEADLINE_S = 2.0  # silence of another receiver that is borne
IDLE_S = 10.0  # how long one may get nothing and have nothing for us although the publisher has
SHUN_S = 60.0  # one that failed isn't asked again for so long

log = logging.getLogger(__name__)


class Route:
    """The link to the publisher, and a second one while another receiver is asked. `taken_from` is the one that is asked for
    versions; the publisher hears every Hello, and says who that is. Whoever fails is passed by: the publisher can always be
    asked. Not thread-safe.
    """

    def __init__(self, publisher: Link, name: str, poll_s: float) -> None:
        self.publisher, self._name, self._poll_s = publisher, name, poll_s
        self._other: Link | None = None
        self._source: RelayAddress | None = None
        self._shunned: dict[RelayAddress, float] = {}  # until when, in monotonic seconds
        self._newest: Version | None = None  # that the publisher named
        self._moved_at = self._left_at = time.monotonic()

    @property
    def taken_from(self) -> Link:
        return self._other or self.publisher

    @property
    def relayed(self) -> bool:
        """Whether that is another receiver."""
        return self._other is not None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around each call of the user: what nobody took meanwhile is not missing."""
        self._moved_at += time.monotonic() - self._left_at
        try:
            with self.publisher.in_use(), self._other.in_use() if self._other else nullcontext():
                yield
        finally:
            self._left_at = time.monotonic()

    def receive(self, until: float) -> Iterator[tuple[Link, Reply, memoryview | None]]:
        """What came in from either. Waits until the first, `until` or what is due. Raises BadTransfer."""
        links = [link for link in (self.publisher, self._other) if link is not None]
        wait_s = min(link.wait_s(until) for link in links)
        for link in links:
            for reply, payload in link.receive(wait_s if link is self.publisher else 0.0):
                yield link, reply, payload

    def keep(self, hello: Hello) -> bool:
        """Does what is due on the links. Returns True if it is another publisher than before. Raises Unavailable after its
        silence."""
        changed = self.publisher.keep(replace(hello, pulling=None) if self.relayed else hello)
        if changed:
            self._leave()
        if self._other is not None:
            try:
                self._other.keep(hello)
            except Unavailable:
                self._pass_by(f"that has said nothing for {DEADLINE_S:g} s")
        return changed

    def follow(self, newest: Version | None, source: RelayAddress | None) -> None:
        """The publisher named a version, and from whom to take versions."""
        self._newest = newest
        if source is not None and self._shunned.get(source, 0.0) > time.monotonic():
            source = None
        if source == self._source:
            return
        self._leave()
        if source is not None:
            self._source = source
            poll_s, poller = min(self._poll_s, DEADLINE_S / 2), self.publisher.poller
            self._other = Link(self._address, name=self._name, poll_s=poll_s, deadline_s=DEADLINE_S, poller=poller)

    def came(self) -> None:
        """Something of a version came, here or to the other receiver."""
        self._moved_at = time.monotonic()

    def greet(self, hello: Hello) -> None:
        """Tells both what we hold."""
        self.publisher.greet(replace(hello, pulling=None) if self.relayed else hello)
        if self._other is not None:
            self._other.greet(hello)

    def check(self, holds: Version | None) -> None:
        """Passes another receiver by that has had nothing for us for IDLE_S, while the publisher has."""
        if self._newest is None or (holds is not None and holds >= self._newest):
            self.came()
        if self._other is not None and time.monotonic() - self._moved_at >= IDLE_S:
            self._pass_by(f"nothing of weights {self._newest} came for {IDLE_S:g} s")

    def close(self) -> None:
        self._leave()
        self.publisher.close()

    def _address(self) -> Address | None:
        """With the keys that the publisher gave us: it tells those whom it names."""
        known, source = self.publisher.address, self._source
        return replace(known, endpoint=source.endpoint, server_key=source.server_key) if known and source else None

    def _pass_by(self, reason: str) -> None:
        assert self._source is not None
        log.warning("%s takes weights from the publisher, and not from %s: %s", self._name, self._source.endpoint, reason)
        self._shunned[self._source] = time.monotonic() + SHUN_S
        self._leave()

    def _leave(self) -> None:
        other, self._other, self._source = self._other, None, None
        if other is not None:
            other.close()
