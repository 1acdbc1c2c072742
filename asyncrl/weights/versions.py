"""Which versions the publisher holds: every receiver gets versions whole, however often there are new ones, in bounded memory.

    publish ──► newest ──► fast round ──► slow round
                  │            │              └ who was still at it when the fast moved on takes the same version to its end
                  │            └ receivers over the socket, all that are ready, take one version together
                  └ receivers of this node open its memory at once, and hold up nothing

As soon as there is a newer version and a receiver that waits for it, those that are still at the older one go on in the slow
round, so nobody holds up anybody. Only while others are in there already, the fast round waits for its own, and for nobody
longer than PATIENCE times what the first of them took. So how often a receiver gets a fresh version depends on how often there
is one and on its own speed.
"""

import math
from collections.abc import Callable, Collection

from msgspec import Struct, field
from msgspec.structs import replace

from asyncrl.models.memory import WeightMemory
from asyncrl.types import Version
from asyncrl.weights.messages import Manifest

PATIENCE = 4.0
PATIENCE_S = 1.0  # nobody is called slow who takes less
FIRST_S = 60.0  # what the first of a round is taken to need while none is done
IDLE_S = 5.0  # a receiver that says nothing for longer is not waited for


class VersionDelta(Struct, frozen=True, kw_only=True):
    """What changed from one version to a later one (weights/delta.py)."""

    base: Version
    version: Version
    data: bytes


class Form(Struct, frozen=True, kw_only=True):
    """What travels of a version, whole or as deltas: the pieces, one after another, in buckets."""

    manifest: Manifest
    pieces: tuple[memoryview, ...]
    checksums: dict[int, int] = field(default_factory=dict)  # of the buckets that somebody took over the socket

    def bucket(self, index: int) -> tuple[memoryview, int]:
        """The bytes of one bucket, and their checksum, which is made when it is first asked for."""
        part, begin, found = self.manifest.bucket(index), 0, []
        for piece in self.pieces:
            if (inside := piece[max(0, part.start - begin) : max(0, part.stop - begin)]).nbytes:
                found.append(inside)
            begin += piece.nbytes
        payload = found[0] if len(found) == 1 else memoryview(b"".join(found))
        if index not in self.checksums:
            self.checksums[index] = self.manifest.checksum(index, payload)
        return payload, self.checksums[index]


class Live(Struct, frozen=True, kw_only=True):
    """One whole, immutable version, and the memory that holds all its bytes. steps: how it came of earlier ones."""

    manifest: Manifest
    memory: WeightMemory
    steps: tuple[VersionDelta, ...] = ()
    forms: dict[Version | None, Form] = field(default_factory=dict)
    arrived: Callable[[], int | None] = lambda: None  # how many of the first buckets of the whole are there; None: all

    def form(self, base: Version | None) -> Form | None:
        """The deltas since `base`, or without one the whole; None where such deltas are not at hand."""
        if base not in self.forms:
            since = next((self.steps[i:] for i, step in enumerate(self.steps) if step.base == base), ())
            if base is None:
                self.forms[None] = Form(manifest=self.manifest, pieces=(self.memory.bytes,))
            elif since:
                manifest = replace(self.manifest, base=base, steps=tuple(len(step.data) for step in since)).signed()
                self.forms[base] = Form(manifest=manifest, pieces=tuple(memoryview(step.data) for step in since))
        return self.forms.get(base)

    @property
    def version(self) -> Version:
        return self.manifest.version


class Receiver(Struct, kw_only=True):
    """A subscriber as the publisher sees it."""

    name: str
    here: str = ""  # it can open memory there; empty: it takes all over the socket
    holds: Version | None = None
    pulling: Version | None = None  # the version that it takes over the socket
    began_at: float = 0.0
    heard_at: float = 0.0
    slow: bool = False


class Round:
    """Receivers that take one version over the socket together."""

    def __init__(self, live: Live, superseded_at: float = math.inf, guess_s: float = FIRST_S) -> None:
        self.live, self.superseded_at, self._guess_s = live, superseded_at, guess_s
        self.first_s = math.inf  # how long the first of them took; infinite while none is done

    @property
    def patience_s(self) -> float:
        return max(PATIENCE * (self.first_s if self.first_s < math.inf else self._guess_s), PATIENCE_S)

    def takes(self, receiver: Receiver, now: float) -> bool:
        """Whether the receiver is at it, and alive."""
        return receiver.pulling == self.live.version and now - receiver.heard_at < IDLE_S

    def waits_for(self, receiver: Receiver, now: float) -> bool:
        """Whether the receiver is at it, and it is not too late: neither by its own time, nor because it began late."""
        since = min(receiver.began_at, self.superseded_at) if self.first_s < math.inf else self.superseded_at
        return self.takes(receiver, now) and now < since + self.patience_s


class VersionCache:
    """Two versions while the learner makes the next, and three in all; those of `newest` and of the two rounds.

    Not thread-safe: its owner locks. `now` is any clock that rises, in seconds, the same for all calls.
    """

    def __init__(self) -> None:
        self.newest: Live | None = None
        self._ready = True
        self._fast: Round | None = None
        self._slow: Round | None = None
        self._slow_s = math.inf  # who takes so long is slow: the patience of the fast round before

    def live(self) -> list[Live]:
        """All versions held, without order."""
        held = (self.newest, *(r.live for r in (self._fast, self._slow) if r is not None))
        return list({live.version: live for live in held if live is not None}.values())

    def find(self, version: Version) -> Live | None:
        return next((live for live in self.live() if live.version == version), None)

    def shares_memory(self, receiver: Receiver) -> bool:
        """Whether the receiver can open the newest version where it lies."""
        place = self.newest.manifest.place if self.newest is not None else None
        return place is not None and place.here == receiver.here

    def offered(self, receiver: Receiver) -> Live | None:
        """The version that the receiver had best take now, if it holds an older one."""
        if self.shares_memory(receiver):
            return self.newest
        slow = self._slow
        if receiver.slow and slow is not None and (receiver.holds is None or slow.live.version > receiver.holds):
            return slow.live
        return self._fast.live if self._fast is not None else None

    def hear(self, receiver: Receiver, holds: Version | None, pulling: Version | None, now: float) -> None:
        """The receiver says, or shows by a request, what it holds and what it takes."""
        if receiver.pulling is not None and holds == receiver.pulling:
            self._end(receiver, now - receiver.began_at)
        if pulling != receiver.pulling:
            receiver.pulling, receiver.began_at = pulling, now
        receiver.holds, receiver.heard_at = holds, now

    def make_room(self) -> None:
        """Before the next version is staged: a version that no round has begun is dropped, which leaves two at most."""
        if self._fast is not None:
            self.newest = self._fast.live

    def drop(self, version: Version) -> None:
        """A version that was still on its way here will not come."""
        rounds = [r if r is not None and r.live.version != version else None for r in (self._fast, self._slow)]
        self._fast, self._slow = rounds
        if self.newest is not None and self.newest.version == version:
            self.newest = self._fast.live if self._fast is not None else None

    def add(self, live: Live, now: float, ready: bool = True) -> None:
        """Makes a version the newest; `make_room` came before. `advance` begins its round, once it was added as `ready`."""
        self.newest, self._ready = live, ready
        if ready and self._fast is not None:
            self._fast.superseded_at = min(self._fast.superseded_at, now)  # the first that came, not the last

    def advance(self, receivers: Collection[Receiver], now: float) -> bool:
        """Ends rounds that wait for nobody. Call it whenever something was heard. Returns True if a fast round began."""
        if self._slow is not None and not self._slow_goes_on(self._slow, receivers, now):
            self._slow = None
        fast = self._fast
        if not self._ready or self.newest is None or (fast is not None and fast.live is self.newest):
            return False
        if fast is not None:
            if not self._may_move_on(fast, receivers, now):
                return False
            self._move_on(fast, [receiver for receiver in receivers if fast.takes(receiver, now)], now)
        self._fast = Round(self.newest)
        return True

    def _slow_goes_on(self, slow: Round, receivers: Collection[Receiver], now: float) -> bool:
        """Whether it still waits for somebody, or for one that is too late while no other slow one wants its place."""
        if any(slow.waits_for(receiver, now) for receiver in receivers):
            return True
        others = [receiver for receiver in receivers if not slow.takes(receiver, now)]
        return len(others) < len(receivers) and not any(receiver.slow for receiver in others)

    def _may_move_on(self, fast: Round, receivers: Collection[Receiver], now: float) -> bool:
        at_it = [receiver for receiver in receivers if fast.takes(receiver, now) and not receiver.slow]
        if not at_it:
            return True
        if not any(self._wants_more(receiver, fast) for receiver in receivers):
            return False
        return self._slow is None or not any(fast.waits_for(receiver, now) for receiver in at_it)

    def _wants_more(self, receiver: Receiver, fast: Round) -> bool:
        holds = receiver.holds
        return holds is not None and holds >= fast.live.version and self.offered(receiver) is fast.live

    def _move_on(self, fast: Round, late: list[Receiver], now: float) -> None:
        """`late` are still at it: they go on in the slow round if there is none, else they must begin again."""
        for receiver in late:
            receiver.slow |= now - receiver.began_at >= fast.patience_s
        if late and self._slow is None:
            self._slow = Round(fast.live, superseded_at=now, guess_s=max(FIRST_S, fast.patience_s))
        self._slow_s = fast.patience_s

    def _end(self, receiver: Receiver, took_s: float) -> None:
        for ended in (self._fast, self._slow):
            if ended is not None and ended.live.version == receiver.pulling:
                ended.first_s = min(ended.first_s, took_s)
        receiver.slow = took_s >= self._slow_s
