"""What the publisher's I/O thread does: answers requests, hints at new versions, notices receivers that died."""

import logging
import threading
import time
from collections.abc import Callable, Collection

import zmq
from msgspec import DecodeError, Struct

from asyncrl.models.memory import WeightMemory
from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.messages import Announce, Bucket, Bye, GetBucket, GetManifest, Gone, Hello, Manifest, Refused, Reply
from asyncrl.weights.sockets import Waker

FETCH_IDLE_S = 5.0  # a receiver silent for longer holds nothing back
FETCH_MAX_S = 60.0  # nor does one that pulls a superseded version for longer than this
BATCH = 64  # requests answered between two looks at anything else
PROBE_S = 5.0  # receivers silent for so long get a hint, which shows whether they still live

log = logging.getLogger(__name__)


class Live(Struct, frozen=True, kw_only=True):
    """One whole, immutable version, and the memory that holds all its bytes."""

    manifest: Manifest
    memory: WeightMemory

    @property
    def version(self) -> Version:
        return self.manifest.version


class Receiver(Struct, kw_only=True):
    """A subscriber as the publisher sees it."""

    name: str
    holds: Version | None = None
    pulling: Version | None = None  # the version that it takes over the socket
    heard_at: float = 0.0


class VersionCache:
    """Keeps the newest version, and one older while it is being pulled. Not thread-safe: its owner locks.

    Progress: if receivers pull slower than the learner publishes, the older version stays until its pull is done, and the one
    between is dropped. Otherwise each publish would take the bytes from under every pull, and none would ever end.
    """

    def __init__(self) -> None:
        self._live: list[Live] = []
        self._superseded_at = 0.0

    @property
    def newest(self) -> Live | None:
        return self._live[-1] if self._live else None

    def __len__(self) -> int:
        return len(self._live)

    def find(self, version: Version) -> Live | None:
        return next((live for live in self._live if live.version == version), None)

    def make_room(self, receivers: Collection[Receiver], now: float) -> None:
        """Before staging: leaves at most one version live."""
        if len(self._live) < 2:
            return
        older = self._live[0]
        pulled = any(r.pulling == older.version and now - r.heard_at < FETCH_IDLE_S for r in receivers)
        keep_older = pulled and now - self._superseded_at < FETCH_MAX_S
        self._live.pop(1 if keep_older else 0)

    def add(self, live: Live, now: float) -> None:
        """Makes a version visible as the newest. Asks for `make_room` first."""
        if len(self._live) == 1:
            self._superseded_at = now
        self._live.append(live)


class Serving:
    """A ROUTER socket and the versions behind it. `step` and `close` belong to the I/O thread.

    All sends are non-blocking: a receiver whose queue is full loses the answer, and asks again. `lock` guards the versions
    and the list of receivers, which other threads read. A peer's nonsense is counted and refused, never fatal.
    """

    def __init__(
        self, router: "zmq.Socket[bytes]", waker: Waker, lock: threading.Condition, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._router, self._waker, self._lock, self._clock = router, waker, lock, clock
        self._versions = VersionCache()
        self._receivers: dict[bytes, Receiver] = {}
        self._probed_at = clock()
        self._counts = dict.fromkeys(("sent_bytes", "unsent", "bad_requests", "receivers_lost"), 0.0)
        self._poller = zmq.Poller()
        self._poller.register(router, zmq.POLLIN)
        self._poller.register(waker.fileno(), zmq.POLLIN)

    def step(self, wait_s: float) -> None:
        """Answers what has come in; waits up to `wait_s` for the first, or for the waker."""
        events = dict(self._poller.poll(int(wait_s * 1000)))
        if self._waker.fileno() in events:
            self._waker.clear()
        with self._lock:
            self._probe()
        if self._router not in events:
            return
        for _ in range(BATCH):
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            with self._lock:
                self._answer(peer, frames)

    def show(self, live: Live) -> None:
        """Makes a version visible and hints at it. Lock held."""
        self._versions.add(live, self._clock())
        for peer in self._receivers:
            self._hint(peer)

    def make_room(self) -> None:
        """Leaves at most one version live. Lock held."""
        self._versions.make_room(self._receivers.values(), self._clock())

    def gauges(self) -> dict[str, float]:
        """sent_bytes, unsent (answers dropped), bad_requests, receivers_lost: totals. The others: now. Lock held."""
        return {
            **self._counts,
            "receivers": float(len(self._receivers)),
            "live_versions": float(len(self._versions)),
        }

    def close(self) -> None:
        """Drops all versions. Lock held."""
        self._versions = VersionCache()

    def _answer(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            (body,) = frames
            request = messages.decode_request(body)
        except (ValueError, DecodeError) as error:
            self._refuse(peer, f"request not understood: {error}")
            return
        match request:
            case Hello(sequence=sequence):
                self._meet(peer, request)
                self._hint(peer, echo=sequence)
            case Bye():
                self._receivers.pop(peer, None)
            case GetManifest(version=version):
                live = self._versions.find(version)
                self._send(peer, live.manifest if live else Gone(version=version))
            case GetBucket(version=version, index=index):
                self._send_bucket(peer, version, index)

    def _meet(self, peer: bytes, hello: Hello) -> None:
        # A receiver that comes back under a new connection replaces its former self.
        for other, known in list(self._receivers.items()):
            if other != peer and known.name == hello.receiver:
                del self._receivers[other]
        self._receivers[peer] = Receiver(name=hello.receiver, holds=hello.holds, pulling=hello.pulling, heard_at=self._clock())

    def _hint(self, peer: bytes, echo: int = 0) -> bool:
        newest = self._versions.newest
        return self._send(peer, Announce(version=newest.version if newest else None, echo=echo))

    def _probe(self) -> None:
        """Forgets receivers that are gone; that their generators died is the supervisor's to act on.

        Only here: an answer that finds nobody proves nothing, for a goodbye may still be in the queue. After so long it isn't.
        """
        now = self._clock()
        if now - self._probed_at < PROBE_S:
            return
        self._probed_at = now
        for peer, receiver in list(self._receivers.items()):
            if now - receiver.heard_at > PROBE_S and not self._hint(peer):
                del self._receivers[peer]
                self._counts["receivers_lost"] += 1
                log.warning(
                    "weight receiver %s is silent and out of reach, holding %s", receiver.name, receiver.holds or "nothing"
                )

    def _send_bucket(self, peer: bytes, version: Version, index: int) -> None:
        if peer in self._receivers:
            self._receivers[peer].pulling, self._receivers[peer].heard_at = version, self._clock()
        live = self._versions.find(version)
        if live is None:
            self._send(peer, Gone(version=version))
        elif not 0 <= index < live.manifest.bucket_count:
            self._refuse(peer, f"bucket {index} of weights {version}, which have {live.manifest.bucket_count}")
        else:
            payload = live.memory.bytes[live.manifest.bucket(index)]
            if self._send(peer, Bucket(version=version, index=index), payload):
                self._counts["sent_bytes"] += len(payload)

    def _refuse(self, peer: bytes, reason: str) -> None:
        self._counts["bad_requests"] += 1
        self._send(peer, Refused(reason=reason))

    def _send(self, peer: bytes, reply: Reply, *payload: memoryview) -> bool:
        try:
            # Copied: a frame that waits for a stalled receiver must not keep the memory of a whole version alive.
            self._router.send_multipart([peer, messages.encode(reply), *payload], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):  # its queue is full, or it is gone
                raise
            self._counts["unsent"] += 1
            return False
        return True
