"""What the publisher's I/O thread does: answers requests, hints at new versions, notices receivers that died."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import zmq
from msgspec.structs import replace

from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.flight import Flight
from asyncrl.weights.messages import (
    Announce,
    Bucket,
    Bye,
    GetBucket,
    GetManifest,
    Gone,
    Hello,
    Refused,
    RelayAddress,
    Reply,
    Request,
)
from asyncrl.weights.sockets import PublisherSocket, Waker
from asyncrl.weights.tree import Tree
from asyncrl.weights.versions import Form, Live, Receiver, VersionCache

BATCH = 64  # requests read between two looks at anything else
MAX_ASKED = 128  # requests of one receiver that may wait; above any sensible credit
PROBE_S = 5.0  # receivers silent for so long get a hint, which shows whether they still live

log = logging.getLogger(__name__)


class Peer:
    """One connection: who is there, and what it asked for."""

    def __init__(self, name: str, key: bytes) -> None:
        self.receiver = Receiver(name=name)
        self.key = key
        self.serves: RelayAddress | None = None
        self.asked: deque[Request] = deque()


class Serving:
    """A ROUTER socket and the versions behind it. `step` and `close` belong to the I/O thread.

    All sends are non-blocking. Each receiver's requests are answered in their order, buckets of all receivers by turns, as
    far as the bytes in flight allow; a request for which there is no room is dropped, and asked again. `lock` guards the
    versions and the list of receivers, which other threads read. A peer's nonsense is counted and refused, never fatal.
    """

    def __init__(
        self,
        server: PublisherSocket,
        waker: Waker,
        lock: threading.Condition,
        clock: Callable[[], float] = time.monotonic,
        flight: Flight | None = None,
        fanout: int = 0,
    ) -> None:
        """fanout: other nodes that a node passes versions on to; 0: every receiver takes them here."""
        self._server, self._router, self._waker, self._lock, self._clock = server, server.socket, waker, lock, clock
        self._versions = VersionCache()
        self._flight = flight or Flight()
        self._peers: dict[bytes, Peer] = {}  # whose turn it is comes first
        self._named: dict[str, Peer] = {}
        self._tree = Tree(fanout) if fanout else None
        self._probed_at = clock()
        self._counts = dict.fromkeys(("sent_bytes", "unsent", "bad_requests", "receivers_lost"), 0.0)
        self._poller = zmq.Poller()
        for source in (server.socket, server.monitor, waker.fileno()):
            self._poller.register(source, zmq.POLLIN)

    def step(self, wait_s: float) -> None:
        """Answers what has come in; waits up to `wait_s` for the first, or for the waker."""
        events = dict(self._poller.poll(int(wait_s * 1000)))
        if self._waker.fileno() in events:
            self._waker.clear()
        if self._server.monitor in events:
            self._server.watch()
        with self._lock:
            with suppress(zmq.Again):
                for _ in range(BATCH if self._router in events else 0):
                    peer, *frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
                    key = str(frames[-1].get("User-Id")).encode()  # of the handshake
                    if self._server.admits(key):  # still
                        self._take(peer.bytes, [frame.bytes for frame in frames], key)
            self._probe()  # a receiver that has just come back isn't silent
            self._advance()
            while self._answer_next():
                pass

    def show(self, live: Live, ready: bool = True) -> None:
        """Makes a version the newest, and hints at it. ready: also for receivers over the socket. Lock held."""
        self._versions.add(live, self._clock(), ready)
        self._versions.advance(self._receivers(), self._clock())
        self.hint_all()

    def drop(self, version: Version) -> None:
        """Takes a version back of which more was to arrive; who is at it is told when it asks. Lock held."""
        self._versions.drop(version)
        self._advance()

    def make_room(self) -> Live | None:
        """Leaves at most two versions live, for the next to be staged; returns the newer one if deltas against it are of use to
        anybody. Lock held."""
        self._versions.make_room()
        remote = any(not self._versions.shares_memory(receiver) for receiver in self._receivers())
        return self._versions.newest if remote else None

    def gauges(self) -> dict[str, float]:
        """sent_bytes, unsent (answers dropped), bad_requests, receivers_lost, connections_cut: totals.

        receivers, live_versions, flight_bytes (sent, not yet confirmed), connections: now. Lock held.
        """
        return {
            **self._counts,
            "connections_cut": float(self._server.cut),
            "receivers": float(len(self._peers)),
            "live_versions": float(len(self._versions.live())),
            "flight_bytes": float(self._flight.nbytes),
            "connections": float(self._server.connections),
        }

    def close(self) -> None:
        """Drops all versions. Lock held."""
        self._versions = VersionCache()

    def _receivers(self) -> list[Receiver]:
        return [peer.receiver for peer in self._peers.values()]

    def _advance(self) -> None:
        if self._versions.advance(self._receivers(), self._clock()):
            self.hint_all()

    def _take(self, identity: bytes, frames: list[bytes], key: bytes) -> None:
        """Notes what a peer says, and queues what it asks for."""
        try:
            (body,) = frames
            request = messages.decode_request(body)
        except (ValueError, *messages.UNREADABLE) as error:
            self._refuse(identity, f"request not understood: {error}")
            return
        if isinstance(request, Bye):
            self._forget(identity)
            self._server.void(key)
            return
        if isinstance(request, Hello) and identity not in self._peers and (name := self._server.owner(key)) is not None:
            self._meet(identity, name, key)
        peer = self._peers.get(identity)
        if peer is None or len(peer.asked) >= MAX_ASKED:  # it asks again after its next Hello
            self._counts["unsent"] += 1
            return
        peer.asked.append(request)
        self._hear(identity, peer.receiver, request)

    def _meet(self, identity: bytes, name: str, key: bytes) -> None:
        # A receiver that comes back under a new connection replaces its former self.
        for other in [other for other, peer in self._peers.items() if peer.receiver.name == name]:
            self._forget(other)
        self._peers[identity] = self._named[name] = Peer(name, key)

    def _hear(self, identity: bytes, receiver: Receiver, request: Request) -> None:
        now = self._clock()
        match request:
            case Hello(holds=holds, pulling=pulling, here=here, confirms=number, serves=serves):
                receiver.here = here
                self._sort(self._named[receiver.name], serves)
                self._versions.hear(receiver, holds, None if self._versions.shares_memory(receiver) else pulling, now)
                self._flight.confirm(identity, number, now)
            case GetManifest(version=version) if not self._versions.shares_memory(receiver):
                self._versions.hear(receiver, receiver.holds, version, now)  # or the version could go before its first bucket
            case GetBucket(version=version, confirms=number):
                self._versions.hear(receiver, receiver.holds, version, now)
                self._flight.confirm(identity, number, now)

    def _forget(self, identity: bytes) -> None:
        if (peer := self._peers.pop(identity, None)) is not None:
            del self._named[peer.receiver.name]
            self._sort(peer, None)
        self._flight.forget(identity)

    def _sort(self, peer: Peer, serves: RelayAddress | None) -> None:
        """Notes where the receiver passes versions on, if it does."""
        peer.serves, receiver = serves, peer.receiver
        if self._tree is not None and serves is not None and not self._versions.shares_memory(receiver):
            self._tree.put(receiver.name, receiver.here or receiver.name)
        elif self._tree is not None:
            self._tree.remove(receiver.name)

    def _answer_next(self) -> bool:
        """Answers one request, of whoever had no turn for longest. Returns False if nobody can be answered now."""
        for identity, peer in self._peers.items():
            if peer.asked and self._may_answer(identity, peer.asked[0]):
                self._peers[identity] = self._peers.pop(identity)
                self._answer(identity, peer, peer.asked.popleft())
                return True
        return False

    def _may_answer(self, identity: bytes, request: Request) -> bool:
        form = self._form(request.version, request.base) if isinstance(request, GetBucket) else None
        return form is None or self._flight.allows(identity, form.manifest.bucket_bytes)

    def _form(self, version: Version, base: Version | None) -> Form | None:
        live = self._versions.find(version)
        return live.form(base) if live is not None else None

    def _answer(self, identity: bytes, peer: Peer, request: Request) -> None:
        match request:
            case Hello(sequence=sequence):
                self._hint(identity, peer.receiver, echo=sequence)
            case GetManifest(version=version, base=base):
                form = self._form(version, base) or self._form(version, None)
                self._send(identity, form.manifest if form else Gone(version=version))
            case GetBucket(version=version, index=index, base=base):
                self._send_bucket(identity, version, index, self._form(version, base))

    def hint_all(self) -> None:
        """Every receiver hears what is there for it; one whose key is void by now is forgotten. Lock held."""
        for identity, peer in list(self._peers.items()):
            if self._server.admits(peer.key):
                self._hint(identity, peer.receiver)
            else:
                self._forget(identity)

    def _hint(self, identity: bytes, receiver: Receiver, echo: int = 0) -> bool:
        live, news = self._versions.offered(receiver), Announce(version=None, echo=echo)
        if live is not None and ((buckets := live.arrived()) is None or not self._versions.shares_memory(receiver)):
            news = replace(news, version=live.version, buckets=buckets)
        if self._tree is not None:
            source = self._tree.source(receiver.name)
            guests = {self._named[name].key: name for name in self._tree.guests(receiver.name)}
            news = replace(news, source=self._named[source].serves if source else None, guests=guests)
        return self._send(identity, news)

    def _probe(self) -> None:
        """Forgets receivers that are gone; that their generators died is the supervisor's to act on.

        Only here: an answer that finds nobody proves nothing, for a goodbye may still be in the queue. After so long it isn't.
        """
        now = self._clock()
        if now - self._probed_at < PROBE_S:
            return
        self._probed_at = now
        self._flight.look(now)
        for identity, peer in list(self._peers.items()):
            receiver = peer.receiver
            if now - receiver.heard_at > PROBE_S and not self._hint(identity, receiver):
                self._forget(identity)
                self._server.void(peer.key)  # should it come back, it asks for another one
                self._counts["receivers_lost"] += 1
                log.warning(
                    "weight receiver %s is silent and out of reach, holding %s", receiver.name, receiver.holds or "nothing"
                )

    def _send_bucket(self, identity: bytes, version: Version, index: int, form: Form | None) -> None:
        if form is None:
            self._send(identity, Gone(version=version))
        elif not 0 <= index < form.manifest.bucket_count:
            self._refuse(identity, f"bucket {index} of weights {version}, which have {form.manifest.bucket_count}")
        elif (live := self._versions.find(version)) and (there := live.arrived()) is not None and index >= there:
            self._counts["unsent"] += 1
        else:
            payload, checksum = form.bucket(index)
            number = self._flight.next_number(identity)
            if self._send(identity, Bucket(version=version, index=index, checksum=checksum, number=number), payload):
                self._flight.send(identity, len(payload), self._clock())
                self._counts["sent_bytes"] += len(payload)

    def _refuse(self, identity: bytes, reason: str) -> None:
        self._counts["bad_requests"] += 1
        self._send(identity, Refused(reason=reason))

    def _send(self, identity: bytes, reply: Reply, *payload: memoryview) -> bool:
        try:
            # Copied: what waits for a stalled receiver is a few buckets then, which are counted, and not a whole version that
            # nobody could take back. The copy is a small part of the cost of encryption.
            self._router.send_multipart([identity, messages.encode(reply), *payload], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):  # its queue is full, or it is gone
                raise
            if error.errno == zmq.EHOSTUNREACH:
                self._flight.forget(identity)
            self._counts["unsent"] += 1
            return False
        return True
