"""How an actor finds its peers, and calls the store over Ray across the store's restarts."""

import asyncio
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayActorError

from asyncrl.errors import Closed, Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.types import Key

SUPERVISOR = Key("supervisor", 0, 0)
ADMIT_S = 5.0  # less than closing a subscriber waits for its thread
ANSWERS = "answers"  # the concurrency group of a model's answers, which hold up no other call


class Peers:
    """Newest known address or handle per peer name. The supervisor puts, and so pushes them; the actor's own threads wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._known = defaultdict[str, tuple[int, Any]](lambda: (-1, None))
        self._closed = False

    def put(self, name: str, restart_count: int, value: Any) -> None:
        """Notes where `name` is now. restart_count rises with every restart; an older one changes nothing."""
        with self._changed:
            if restart_count > self._known[name][0]:
                self._known[name] = (restart_count, value)
                self._changed.notify_all()

    def peek(self, name: str) -> Any:
        """The newest value, or None."""
        return self.known(name)[1]

    def known(self, name: str) -> tuple[int, Any]:
        """The newest restart_count and value; (-1, None) if there is none."""
        with self._changed:
            return self._known[name]

    def wait(self, name: str, newer_than: int, deadline: float) -> tuple[int, Any]:
        """Blocks until `name` has a restart_count above `newer_than`; `put` wakes it.

        Raises Closed when the actor stops, Unavailable at `deadline` (time.monotonic seconds).
        """
        with self._changed:
            left_s = deadline - time.monotonic()
            self._changed.wait_for(lambda: self._closed or self._known[name][0] > newer_than, left_s)
            if self._known[name][0] > newer_than:  # one that stops may still tell the store what it has
                return self._known[name]
            if self._closed:
                raise Closed(f"stopped while waiting for {name}")
            raise Unavailable(f"{name}: no living incarnation was announced before the deadline")

    def close(self) -> None:
        """Wakes every waiter with Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def call_store(handle: Any, verb: str, *arguments: Any, key: Key = SUPERVISOR) -> Any:
    """Asks the store actor; returns Ray's reference to the reply."""
    return handle.call.options(concurrency_group=VERBS[verb].caller).remote(verb, key, *arguments)


def ask_ranks(followers: Sequence[Any], verb: str, *arguments: Any) -> Callable[[], Any]:
    """How a learner's first rank asks the others (learn/parallel/gang.py). Arguments are put into Ray's object store once, and
    read by all ranks of a node where they lie. Returns what waits for the replies, as long as a rank that lives needs; the
    supervisor watches these."""
    shared = [ray.put(argument) for argument in arguments]
    return partial(ray.get, [follower.ask.remote("serve", verb, *shared) for follower in followers])


class RayCall:
    """The transport of a ReplayClient: calls whatever store incarnation lives now."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def __call__(self, verb: str, key: Key, *args: Any, timeout_s: float) -> Any:
        """Blocks for the reply. Raises Unavailable after `timeout_s`; and as soon as it is worth while to ask again, which the
        client does: where the store can't be reached just now, or died and another one lives. Raises Closed when the actor
        stops; the store's own errors pass."""
        deadline = time.monotonic() + timeout_s
        restart_count, handle = self._peers.wait("store", -1, deadline)
        try:
            return ray.get(call_store(handle, verb, *args, key=key), timeout=max(deadline - time.monotonic(), 0.001))
        except GetTimeoutError:
            raise Unavailable(f"store: no reply to {verb} within {timeout_s:.0f} s") from None
        except ActorUnavailableError as error:
            raise Unavailable(f"store: out of reach: {error}") from None
        except (RayActorError, OutOfMemoryError):  # the latter: killed by Ray's memory monitor
            self._peers.wait("store", restart_count, deadline)
            raise Unavailable(f"store: it died at {verb}, and was restarted") from None


class RayBus:
    """How a generator finds the weight bus, with keys of its own: its learner gives them out."""

    def __init__(self, peers: Peers, name: str, incarnation: int) -> None:
        self._peers, self._receiver = peers, (name, incarnation)
        self._asked = -1  # restart_count of the learner that gave the last address

    def moved(self) -> bool:
        """Whether another learner was announced than the one that gave the last address. At once."""
        return self._peers.known("bus")[0] != self._asked

    def __call__(self) -> Any:
        """The bus's address; None before there is one. Raises Unavailable if the learner doesn't answer, and Fenced."""
        restart_count, learner = self._peers.known("bus")
        if learner is None:
            return None
        try:
            address = ray.get(learner.ask.remote("admit", *self._receiver), timeout=ADMIT_S)
        except GetTimeoutError:
            raise Unavailable(f"learner: it gave no key to the weight bus within {ADMIT_S:g} s") from None
        except (RayActorError, OutOfMemoryError) as error:  # another one is announced
            raise Unavailable(f"learner: out of reach: {error}") from None
        self._asked = restart_count
        return address


class RayModel:
    """Asks the actors that serve a reward's model in turn, those that are up. Call it from one event loop.

    deadline_s: for an answer. patience_s: how long none of them may be up.
    """

    def __init__(self, peers: Peers, names: Sequence[str], deadline_s: float, patience_s: float) -> None:
        self._peers, self._names, self._turns = peers, names, itertools.count()
        self._deadline_s, self._patience_s = deadline_s, patience_s
        self._dead = dict.fromkeys(names, -1)  # restart_count of the last one that is gone

    async def __call__(self, chat: Any) -> Any:
        """Its answer. Waits while none is up. Raises TimeoutError, Closed, and Unavailable where another one may answer."""
        up = [name for name in self._names if self._peers.known(name)[0] > self._dead[name]] or self._names
        name = up[next(self._turns) % len(up)]
        restart_count, handle = self._peers.known(name)
        if restart_count == self._dead[name]:
            deadline = time.monotonic() + self._patience_s
            restart_count, handle = await asyncio.to_thread(self._peers.wait, name, restart_count, deadline)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await handle.ask.options(concurrency_group=ANSWERS).remote("answer", chat)
        except ActorUnavailableError as error:
            raise Unavailable(f"{name}: out of reach: {error}") from None
        except (RayActorError, OutOfMemoryError):
            self._dead[name] = max(restart_count, self._dead[name])
            raise Unavailable(f"{name}: it died while it was asked") from None
