"""A generator's end of the weight bus: pulls the newest version, and shows it only when it is whole and verified."""

import logging
import os
import threading
import time
from typing import Literal

from asyncrl.errors import BadTransfer, Closed, ConfigError
from asyncrl.interfaces import Tensors
from asyncrl.models.memory import WeightMemory, here
from asyncrl.types import Version
from asyncrl.weights.assembly import Assembly
from asyncrl.weights.link import Link, Resolve
from asyncrl.weights.messages import Announce, Bucket, GetBucket, GetManifest, Gone, Hello, Manifest, Refused, Reply
from asyncrl.weights.relay import WeightRelay
from asyncrl.weights.route import Route

CLOSE_TIMEOUT_S = 10.0
MAX_FAILURES = 3  # damaged transfers in a row

log = logging.getLogger(__name__)


class WeightSubscriber:
    """Receives weights from whichever publisher `resolve()` names. Implements interfaces.WeightSource.

    resolve: returns the newest publisher's address, or None (none known), or raises Unavailable; with a deadline of its own.
    It is asked now and then although the publisher answers, which may have a successor; if it has a method `moved`, which must
    not block, only where that says so.
    name: who this is, in the publisher's reports. transport: `auto` maps the memory of a publisher on this node.
    credit: buckets asked for ahead. poll_s: how often the publisher is asked what is newest, should a hint get lost.
    deadline_s: silence of the publisher that `next` bears.
    codec: `delta` asks for what changed since the version that came last, which it keeps for that if it came over the socket.
    relay: passes on what comes, to whom the publisher says; `close` closes it.
    """

    def __init__(
        self,
        resolve: Resolve,
        *,
        name: str = "",
        transport: Literal["auto", "tcp"] = "auto",
        credit: int = 16,
        poll_s: float = 1.0,
        deadline_s: float = 30.0,
        codec: Literal["full", "delta"] = "full",
        relay: WeightRelay | None = None,
    ) -> None:
        if credit < 1:
            raise ValueError(f"credit={credit} < 1: no bucket would ever be asked for; use at least 1")
        self._here = here() if transport == "auto" else ""
        self._unopened = 0  # how often in a row memory was not there; twice, and a version is taken over the socket
        self._credit = credit
        self._name = name or f"{os.uname().nodename}:{os.getpid()}"
        publisher = Link(resolve, name=self._name, poll_s=poll_s, deadline_s=deadline_s)
        self._route, self._relay = Route(publisher, self._name, poll_s), relay
        self._lock = threading.Lock()  # held by whoever uses the link
        self._closed = threading.Event()
        self._holds: Version | None = None
        self._codec = codec
        self._base: tuple[Version, WeightMemory] | None = None  # what deltas may change
        self._newest: Version | None = None  # as announced
        self._asked_manifest: tuple[Version, int] | None = None  # with the number of the last Hello before it
        self._barrier = 0  # announcements count again from the answer to this Hello on
        self._assembly: Assembly | None = None
        self._there: int | None = None  # how many buckets are to be had now; None: all
        self._failures = 0
        versions = ("versions", "shared_versions", "delta_versions", "relayed_versions")
        self._counts = dict.fromkeys(("received_bytes", *versions, "bad_transfers", "asked_again"), 0.0)
        self._fetch_s = 0.0

    def next(self, after: Version | None, wait_s: float) -> tuple[Version, Tensors] | None:
        """The newest whole version if it supersedes `after`, else None at the deadline (`wait_s`, seconds).

        A transfer that takes longer goes on in the next call. The tensors are a FlatTensors, which nobody can change.
        Raises Unavailable (no publisher for deadline_s), BadTransfer (MAX_FAILURES damaged transfers in a row; the next
        call tries again), ConfigError (this node has not the memory), Closed (`close` was called; wakes a waiting call).
        """
        until = time.monotonic() + wait_s
        with self._lock:
            self._check_open()
            with self._route.in_use():
                self._holds = after
                while True:
                    if (found := self._step(until)) is not None:
                        return found
                    self._check_open()
                    if time.monotonic() >= until:
                        return None

    def gauges(self) -> dict[str, float]:
        """fetch_s: the last version, from its manifest to whole. Totals: the counts (relayed_versions: from another
        receiver), and connections to the publisher."""
        return {**self._counts, "fetch_s": self._fetch_s, "connections": float(self._route.publisher.connections)}

    def close(self) -> None:
        """Ends a waiting `next` in another thread, then closes the connection. Harmless when repeated."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._route.publisher.waker.set()
        if self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
            try:
                self._route.close()
            finally:
                self._lock.release()
        if self._relay is not None:
            self._relay.close()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Closed("weight subscriber is closed: no version will come")

    def _step(self, until: float) -> tuple[Version, Tensors] | None:
        """One round: what came in, what is due, what to ask next. A damaged transfer is repeated, a few times."""
        link = self._link
        try:
            for origin, reply, payload in self._route.receive(until):
                self._take(origin, reply, payload)
            if self._route.keep(self._hello):
                self._discard(barrier=self._link.hello)  # whatever the former publisher left half-sent dies with it
            self._route.check(self._holds)
            if self._link is not link:
                self._turn()
            return self._advance()
        except BadTransfer:
            self._counts["bad_transfers"] += 1
            self._failures += 1
            self._restart()
            if self._failures >= MAX_FAILURES:
                self._failures = 0
                raise
            return None
        except ConfigError as error:
            if self._codec == "full":
                raise
            # Not the error itself, which would keep the base for as long as a log has it.
            log.warning("weights come whole from now on, for there is no room for a delta's base beside them: %s", str(error))
            self._codec, self._base = "full", None
            self._restart()
            return None

    def _take(self, origin: Link, reply: Reply, payload: memoryview | None) -> None:
        match reply:
            case Announce():
                if origin is self._route.publisher:
                    self._route.follow(reply.version, reply.source)
                    if self._relay is not None:
                        self._relay.welcome(reply.guests)
                if origin is self._link:
                    self._hear(reply)
                    if reply.echo == 0:  # a hint: more of a version came there, if not to us
                        self._route.came()
            case Manifest():
                self._begin(reply)
            case Bucket(version=version, index=index, checksum=checksum, number=number):
                origin.confirms, assembly = number, self._assembly
                if origin is self._link and assembly is not None and assembly.version == version and payload is not None:
                    self._put(assembly, index, payload, checksum)
            case Gone(version=version):
                if version == self._pulling and origin is self._link:
                    self._restart()
            case Refused(reason=reason):
                raise BadTransfer(f"weight publisher refused a request: {reason}")

    def _put(self, assembly: Assembly, index: int, payload: memoryview, checksum: int) -> None:
        assembly.put(index, payload, checksum)
        self._counts["received_bytes"] += len(payload)
        self._route.came()
        if self._relay is not None:
            self._relay.arrived()

    def _hear(self, news: Announce) -> None:
        newest, echo = news.version, news.echo
        if echo >= self._barrier:
            self._barrier = 0
        if self._barrier == 0:
            self._newest = newest
        # Another version: it has all of ours, or has given it up and says so.
        self._there = news.buckets if self._assembly is None or self._assembly.version == newest else None
        # Answers keep the order of the requests: what was asked before this Hello, and isn't here, was dropped.
        if self._asked_manifest is not None and self._asked_manifest[1] < echo:
            self._asked_manifest = None
        if self._assembly is not None:
            self._counts["asked_again"] += self._assembly.answered(echo)

    def _begin(self, manifest: Manifest) -> None:
        if self._asked_manifest is None or self._asked_manifest[0] != manifest.version:
            return
        self._asked_manifest = None
        place, shared = manifest.place, None
        if not manifest.steps:  # nothing changes the base any more, and there may be no room for both
            self._base = None
        if place is not None and self._opens and place.here == self._here:
            shared = WeightMemory.open(place, manifest.total_bytes)
            if shared is None:  # the version is gone, or its memory is not for us
                self._unopened += 1
                self._restart()
                return
        self._assembly = Assembly(manifest, shared)
        if self._relay is not None and self._assembly.base is None and shared is None:
            self._relay.begin(self._assembly)

    def _advance(self) -> tuple[Version, Tensors] | None:
        """Asks for what is next; returns the version once it is whole."""
        if self._assembly is None:
            newest = self._newest
            if newest is not None and (self._holds is None or newest > self._holds) and self._asked_manifest is None:
                self._asked_manifest = (newest, self._link.hello)
                self._link.send(GetManifest(version=newest, base=self._base[0] if self._base is not None else None))
            return None
        if self._holds is not None and self._assembly.version <= self._holds:
            self._restart()
            return None
        version, base = self._assembly.version, self._assembly.base
        for index in self._assembly.ask(self._credit, self._link.hello, self._there):
            self._link.send(GetBucket(version=version, index=index, base=base, confirms=self._link.confirms))
        return self._deliver(self._assembly) if self._assembly.whole else None

    def _deliver(self, assembly: Assembly) -> tuple[Version, Tensors]:
        base, self._base = self._base, None  # a delta that fails is followed by a whole version
        tensors = assembly.tensors(base[1] if base is not None and base[0] == assembly.base else None)
        if self._codec == "delta" and not assembly.is_shared:
            self._base = assembly.version, tensors.memory
        if self._relay is not None and assembly.base is not None:
            self._relay.show(assembly, tensors.memory)
        self._counts["versions"] += 1
        self._counts["relayed_versions"] += self._route.relayed
        self._counts["delta_versions"] += assembly.base is not None
        self._counts["shared_versions"] += assembly.is_shared
        self._fetch_s = time.monotonic() - assembly.begun_at
        self._failures = 0
        self._holds = assembly.version
        self._assembly, self._unopened = None, 0
        self._route.greet(self._hello)  # so that nobody needs to keep the version for us
        return assembly.version, tensors

    @property
    def _opens(self) -> bool:
        return self._unopened < 2

    @property
    def _hello(self) -> Hello:
        return Hello(
            sequence=0,
            holds=self._holds,
            pulling=self._pulling,
            here=self._here if self._opens else "",
            serves=self._relay.source if self._relay is not None else None,
        )

    @property
    def _link(self) -> Link:
        """To whom is asked for versions."""
        return self._route.taken_from

    def _turn(self) -> None:
        """Versions come from somebody else than before: what is here of one stays, and the rest is asked for there."""
        self._newest = self._asked_manifest = None
        self._barrier, self._there = 0, 0 if self._route.relayed else None
        if self._assembly is not None:
            self._assembly.ask_again()
        self._link.hurry()

    @property
    def _pulling(self) -> Version | None:
        """The version that is or will be taken over the socket, which the publisher keeps for that.

        From the request for its manifest on: a Hello that says less would let the version go before its first bucket.
        """
        if self._assembly is not None:
            return None if self._assembly.is_shared else self._assembly.version
        return self._asked_manifest[0] if self._asked_manifest is not None else None

    def _restart(self) -> None:
        """Discards what is half here, and asks what is newest. Replies to older requests are passed over till the answer."""
        self._discard(barrier=self._link.hello + 1)
        self._link.hurry()

    def _discard(self, barrier: int) -> None:
        if self._relay is not None and self._assembly is not None:
            self._relay.give_up(self._assembly.version)
        self._assembly = self._newest = self._asked_manifest = None
        self._barrier = barrier
