"""How many requests one server takes at a time, from what it says of its load. Pure; not thread-safe.

Additive increase, multiplicative decrease: it converges to a fair and efficient share from any start (Chiu and Jain, 1989),
and is how TCP finds the capacity of a path that it can't see (Jacobson and Karels, 1988). Here the path is a server's KV
cache: how many rollouts fit depends on how long they get, which nobody knows when they begin.

A request beyond what fits is not free. It waits in the server while its weights and its place in the bound grow old, or it
throws another one out of the cache, whose tokens are then computed again.
"""

from msgspec import Struct

from asyncrl.errors import ConfigError

# TCP halves, since a router drops what does not fit. A server only queues or recomputes it, so a smaller step back will do,
# and keeps the server fuller.
DECREASE = 0.75
# With less than a tenth left, requests that wait do so for want of cache rather than for their turn.
KV_FULL = 0.9
# Full range in 16 increases: fast enough to find capacity again after a longer spell, slow against one observation's noise.
INCREASES = 16
# Observations after a decrease in which nothing changes: what is told then is mostly the congestion just answered.
SETTLE = 4
# Observations in a row with a queue until it counts. A batch that just arrived waits for its prefill, and that is no queue.
QUEUED = 3


class Load(Struct, frozen=True, kw_only=True):
    """One observation of a server.

    running, waiting: requests that it decodes, and that it has queued. kv_usage: share of the KV cache in use, 0 to 1.
    retracted: how often it threw a running request out for want of KV since the last observation (not at a weight update).
    in_flight: requests that we have sent it and that have not ended.
    """

    running: int
    waiting: int
    kv_usage: float
    retracted: int
    in_flight: int


class Window:
    """Slots of one server, between `least` and `most`. Begins with `most`, so that nobody waits for it to open.

    most: what the user allows. least: best a whole group, as nothing smaller is ever asked for.

    A decrease holds for those to come: requests in flight stay. Until they are down to the window, there is no other one.
    """

    def __init__(self, most: int, least: int = 1) -> None:
        if not 1 <= least <= most:
            raise ConfigError(f"window of {least} to {most} slots: a server needs 1 <= least <= most to take any; raise most")
        self._most, self._least = most, least
        self._step = max(1, most // INCREASES)
        self._slots = most
        self._settling = 0  # observations left in which nothing changes
        self._queued = 0  # observations in a row with a queue
        self._before = 0  # in flight at the last observation

    @property
    def slots(self) -> int:
        return self._slots

    def observe(self, load: Load) -> None:
        """Takes one observation, of about constant spacing (a second or so)."""
        # A freed place is to be refilled at once, so a short queue is welcome. None runs: paused, or only starting.
        self._queued = self._queued + 1 if load.waiting > self._step and load.running > 0 else 0
        # Requests may have ended since the retraction: what was too much is the higher of the two.
        reached, self._before = max(self._before, load.in_flight), load.in_flight
        short = load.retracted > 0 or (load.waiting > 0 and load.kv_usage > KV_FULL)
        draining = load.in_flight > self._slots
        if self._settling > 0:
            self._settling -= 1
        elif short:
            if not draining:
                self._decrease(reached, to=self._least)
        elif self._queued >= QUEUED:
            if not draining:
                self._decrease(reached, to=load.running + self._step)
        elif load.waiting == 0 and self._is_used(load) and self._would_fit(load):
            self._slots = min(self._most, self._slots + self._step)

    def _decrease(self, reached: int, *, to: int) -> None:
        """A step down from what was really in flight (RFC 5681: the flight size, not the window), no lower than `to`."""
        lower = max(int(DECREASE * min(self._slots, reached)), to, self._least)
        self._slots = min(self._slots, lower)
        self._settling, self._queued = SETTLE, 0

    def _is_used(self, load: Load) -> bool:
        """Only a window that is full says that a larger one would help. Whole groups seldom fill it to the last slot."""
        return load.in_flight + max(self._least, self._slots // 8) > self._slots

    def _would_fit(self, load: Load) -> bool:
        """Whether the cache had room for the increase, if new requests cost what those in flight do.

        A new request is small and grows for long, so without this the window would run far past capacity before it is told.
        """
        each = load.kv_usage / max(load.in_flight, 1)
        return load.kv_usage + self._step * each <= KV_FULL
