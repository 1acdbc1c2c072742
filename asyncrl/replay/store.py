"""The replay store as an actor: long polls over the synchronous core (core.py), and the log below it.

Who waits for whom: generators in `reserve` (for room or a cancellation), reward workers in `lease_unscored`
(for rows), the learner in `lease_batch` (for ready groups). Every other call is replied to at once. All waits end at their
deadline. A call that changes something answers, in the same step, those who need not wait any longer, and only those.

A reply goes out when the log holds all that it knows of. What the calls of one turn of an event loop recorded is written
together: many while many come, and without delay where only one does.

Rows come and go as Arrow IPC bytes that the callers encode and decode; everything else is a small struct. Calls may run on
several event loops in several threads (Ray gives each concurrency group its own), so that long polls never starve a commit.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from asyncrl.config import StoreSpec
from asyncrl.disk import naming_full_disk
from asyncrl.errors import AsyncRLError, Closed, DiskFull, Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.replay.context import Poll, Topic
from asyncrl.replay.core import StoreCore
from asyncrl.replay.log.log import ReplayLog, locked
from asyncrl.replay.plan import StorePlan
from asyncrl.types import Key

Stream = tuple[str, str]  # the calls of one verb by one worker
Loop = asyncio.AbstractEventLoop
_LOCK_WAIT_S = 10.0  # for a predecessor that was killed a moment ago


class Waiter:
    """A call that waits, on the event loop where it was made."""

    def __init__(self, stream: Stream, key: Key) -> None:
        self.stream, self.key = stream, key
        self.reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.poll: Poll | None = None  # None: it does not wait yet, or no longer

    @property
    def awaits(self) -> tuple[Topic | int | str, ...]:
        """What it waits for: a topic, the end of its worker, and what becomes of the groups that this one holds."""
        return () if self.poll is None else ("all", self.poll.topic, self.key.worker, *self.poll.held)


class ReplayStore:
    """Opens the log in `folder`, or rebuilds its state from it. clock: monotonic seconds, for leases."""

    def __init__(
        self, plan: StorePlan, folder: Path, spec: StoreSpec = StoreSpec(), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = locked(folder, _LOCK_WAIT_S)
        self._writing = partial(naming_full_disk, folder, spec.segment_bytes)  # as a segment may have to be closed
        with self._writing():
            self._log = ReplayLog(folder, spec)
        self._core = StoreCore(plan, self._log, clock)
        self._lock = threading.Lock()
        self._closed = False
        self._waiters: defaultdict[Topic | int | str, dict[Waiter, None]] = defaultdict(dict)  # by what for, first come first
        self._watching: set[Loop] = set()  # where somebody waits: they look at the leases from time to time
        self._replies: list[tuple[asyncio.Future[Any], Any]] = []  # that go out when the log holds what they know of
        self._flushing: set[Loop] = set()  # that are about to see to that
        self._calls: dict[Stream, Waiter] = {}  # the newest call that waits or waited
        self._replied: dict[Stream, tuple[Key, Any]] = {}  # to the newest call that had something to wait for

    async def call(self, verb: str, key: Key, *args: Any) -> Any:
        """Replies to a call of one of the protocols in `asyncrl.interfaces`: `args` are its arguments, rows as Arrow bytes.

        Only verbs that wait do so; a repeat of one gets the first reply. The others may be repeated as they are.
        """
        kind = VERBS[verb]
        kind.signature.bind(self, *args)  # raises TypeError here, where it harms nothing
        run = partial(self._core.verbs[verb], key, *args)
        if kind.waits:
            return await self._wait(Waiter((verb, key.worker), key), run)
        with self._stepping(key):
            reply = asyncio.get_running_loop().create_future()
            self._replies.append((reply, run()))
        return await reply

    async def close(self) -> None:
        """Closes the log's segments. Calls that still come, or wait, raise `Closed`."""
        with self._lock:
            if self._closed:
                return
            try:
                self._write()
                if self._core.context.broken is None:  # else rows may be in the tail that no event names
                    self._log.seal()
                self._log.close()
            finally:
                self._folder.close()
                self._closed = True
                self._serve()

    # --------------------------------------------------------------------------------------------- steps

    @contextmanager
    def _stepping(self, key: Key) -> Iterator[None]:
        """Around one step of the core for a caller. Answers whom it lets go on."""
        with self._lock, self._core.time.span("busy"):
            self._check(key)
            try:
                with self._breaking(), self._core.context.recording():
                    yield
            finally:
                self._serve()

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """What is not the caller's mistake breaks the store: it raises Unavailable or DiskFull from then on."""
        context = self._core.context
        try:
            with self._writing():
                yield
        except Exception as error:
            if isinstance(error, DiskFull) or not isinstance(error, AsyncRLError | ValueError):
                context.broken = error
            if context.broken is not None:
                raise self._unavailable() from error
            raise

    def _unavailable(self) -> AsyncRLError:
        broken = self._core.context.broken
        if isinstance(broken, DiskFull):
            return DiskFull(str(broken))  # whoever calls again, and whoever restarts the store, would meet it again
        return Unavailable(
            f"the replay store stopped at its first failed write or keep function ({type(broken).__name__}: {broken}); "
            "what was acknowledged is in the log; see to the disk or fix the function, then restart the store"
        )

    def _check(self, key: Key) -> None:
        if self._closed:
            raise Closed("the replay store is closed: the run has stopped")
        if self._core.context.broken is not None:
            raise self._unavailable()
        self._core.check(key)

    # --------------------------------------------------------------------------------------------- waits

    async def _wait(self, waiter: Waiter, begin: Callable[[], Poll]) -> Any:
        """The reply, or None for a call that its own worker abandoned for a newer one: that does not `begin`, since what it
        says of its caller is out of date, takes nothing, and its reply reaches nobody."""
        with self._stepping(waiter.key):
            wait_s = self._begin(waiter, begin)
        if not wait_s:
            return await waiter.reply
        late = waiter.reply.get_loop().call_later(wait_s, self._late, waiter)
        try:
            return await waiter.reply
        finally:
            late.cancel()
            with self._lock:
                self._leave(waiter)

    def _begin(self, waiter: Waiter, begin: Callable[[], Poll]) -> float:
        """Tries for the first time. For how many seconds to wait."""
        stream, key = waiter.stream, waiter.key
        known, reply = self._replied.get(stream, (None, None))
        newest = self._calls.get(stream, waiter)
        if known == key or (key.incarnation, key.sequence) < (newest.key.incarnation, newest.key.sequence):
            self._replies.append((waiter.reply, reply if known == key else None))
            return 0.0
        self._calls[stream] = waiter
        self._end(newest, None)
        waiter.poll = poll = begin()
        self._core.expire()
        self._try(waiter, last=poll.wait_s <= 0)
        if waiter.poll is None:
            return 0.0
        self._enter(waiter)
        return poll.wait_s

    def _try(self, waiter: Waiter, last: bool = False) -> None:
        """Ends a wait if it is over. last: with whatever reply there is."""
        if waiter.reply.done() or waiter.reply.get_loop().is_closed():  # who called does not wait for it any more
            self._leave(waiter)
        if waiter.poll is None:
            return
        try:
            self._check(waiter.key)
            with self._breaking(), self._core.context.recording():
                done, reply = waiter.poll.attempt()
        except Exception as error:
            self._end(waiter, error)
            return
        if done:
            self._replied[waiter.stream] = waiter.key, reply
        if done or last:
            self._end(waiter, reply)

    def _serve(self) -> None:
        """Has those who wait for what has changed try again, first come first served, as long as there is something left. What
        they are told, and what was recorded, goes out soon."""
        context = self._core.context
        if self._closed or context.broken is not None:
            context.stir("all")
        while context.stirred:
            stirred, context.stirred = context.stirred, {}
            for name in stirred:
                for waiter in list(self._waiters.get(name, ())):
                    if not self._core.offers(name):
                        break
                    self._try(waiter)
        self._flush_soon()

    def _late(self, waiter: Waiter) -> None:
        """At the deadline of a call."""
        with self._lock:
            self._try(waiter, last=True)
            self._serve()

    def _watch(self, loop: Loop) -> None:
        """Takes work back from the silent, again and again while somebody waits."""
        with self._lock:
            self._core.expire()
            self._serve()
            if self._waiters:
                loop.call_later(self._core.look_again_s(), self._watch, loop)
            else:
                self._watching.discard(loop)

    def _enter(self, waiter: Waiter) -> None:
        for name in waiter.awaits:
            self._waiters[name][waiter] = None
        if (loop := waiter.reply.get_loop()) not in self._watching:
            self._watching.add(loop)
            loop.call_later(self._core.look_again_s(), self._watch, loop)

    def _leave(self, waiter: Waiter) -> None:
        """It waits no longer, however that came."""
        for name in waiter.awaits:
            self._waiters[name].pop(waiter, None)
            if not self._waiters[name]:
                del self._waiters[name]
        waiter.poll = None

    def _end(self, waiter: Waiter, reply: Any) -> None:
        if waiter.poll is not None:
            self._leave(waiter)
            self._replies.append((waiter.reply, reply))

    # --------------------------------------------------------------------------------------------- writes

    def _flush_soon(self) -> None:
        """Before this event loop waits: what its calls recorded until then goes to the log together, if they come in a row."""
        loop = asyncio.get_running_loop()
        if (self._replies or self._core.context.unwritten) and loop not in self._flushing:
            self._flushing.add(loop)
            loop.call_soon(self._flush, loop)

    def _flush(self, loop: Loop) -> None:
        with self._lock, self._core.time.span("busy"):
            self._write()
            self._serve()  # a write that failed ends every wait
            self._flushing.discard(loop)
            replies, self._replies = self._replies, []
        for future, reply in replies:
            if future.get_loop() is loop:
                _resolve(future, reply)
            elif not future.get_loop().is_closed():
                future.get_loop().call_soon_threadsafe(_resolve, future, reply)

    def _write(self) -> None:
        """What was recorded is in the log before a reply that knows of it goes out: group commit."""
        try:
            with self._breaking():
                self._core.context.write()
        except AsyncRLError:
            self._replies = [(future, self._unavailable()) for future, _ in self._replies]


def _resolve(future: "asyncio.Future[Any]", reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)


class LocalTransport:
    """A transport without Ray, for who composes the stages by hand: runs a ReplayStore on an event loop in a thread of its own.
    Any thread may call. `close` ends both."""

    def __init__(self, store: ReplayStore) -> None:
        self._store = store
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replay-store", daemon=True)
        self._thread.start()

    def __call__(self, verb: str, key: Key, *args: Any, timeout_s: float) -> Any:
        """Blocks for the reply. Raises Unavailable after `timeout_s`; the store's own errors pass."""
        future = asyncio.run_coroutine_threadsafe(self._store.call(verb, key, *args), self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise Unavailable(f"store: no reply to {verb} within {timeout_s:g} s") from None

    def close(self) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self._store.close(), self._loop).result(60.0)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
