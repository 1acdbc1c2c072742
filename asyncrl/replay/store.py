"""The replay store as an actor: long polls over the synchronous core (core.py), and the log below it.

Who waits for whom: generators in `reserve` (for room or a cancellation), reward workers in `lease_unscored`
(for rows), the learner in `lease_batch` (for ready groups). Every other call is replied to at once. All waits end at their
deadline; every change of state wakes all of them; a lease that runs out wakes them too.

Rows come and go as Arrow IPC bytes that the callers encode and decode; everything else is a small struct. Calls may run on
several event loops in several threads (Ray gives each concurrency group its own), so that long polls never starve a commit.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from asyncrl.config import StoreSpec
from asyncrl.disk import naming_full_disk
from asyncrl.errors import AsyncRLError, Closed, DiskFull, Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.replay.core import StoreCore
from asyncrl.replay.ledger import Poll
from asyncrl.replay.log.log import ReplayLog, locked
from asyncrl.replay.plan import StorePlan
from asyncrl.types import Key

T = TypeVar("T")
Stream = tuple[str, str]  # the calls of one verb by one worker
_LOCK_WAIT_S = 10.0  # for a predecessor that was killed a moment ago


class ReplayStore:
    """Opens the log in `folder`, or rebuilds its state from it. clock: monotonic seconds, for leases and deadlines."""

    def __init__(
        self, plan: StorePlan, folder: Path, spec: StoreSpec = StoreSpec(), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = locked(folder, _LOCK_WAIT_S)
        self._writing = partial(naming_full_disk, folder, spec.segment_bytes)  # as a segment may have to be closed
        with self._writing():
            self._log = ReplayLog(folder, spec)
        self._core = StoreCore(plan, self._log, clock)
        self._clock = clock
        self._lock = threading.Lock()
        self._waiters: set[asyncio.Future[None]] = set()  # one of each call that waits, on the event loop where it does
        self._closed = False
        self._calls: dict[Stream, tuple[Key, object]] = {}  # the newest call that waits or waited
        self._replies: dict[Stream, tuple[Key, Any]] = {}  # to the newest call that had something to wait for

    async def call(self, verb: str, key: Key, *args: Any) -> Any:
        """Replies to a call of one of the protocols in `asyncrl.interfaces`: `args` are its arguments, rows as Arrow bytes.

        Only verbs that wait do so; a repeat of one gets the first reply. The others may be repeated as they are.
        """
        VERBS[verb].signature.bind(self, *args)  # raises TypeError here, where it harms nothing
        run = partial(self._core.verbs[verb], key, *args)
        return await self._poll((verb, key.worker), key, run) if VERBS[verb].waits else self._do(key, run)

    async def close(self) -> None:
        """Closes the log's segments. Calls that still come, or wait, raise `Closed`."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._core.context.broken is None:  # else rows may be in the tail that no event names
                    self._log.seal()
                self._log.close()
            finally:
                self._folder.close()
                self._closed = True
                self._wake()

    def _do(self, key: Key, action: Callable[[], T]) -> T:
        """Runs one step of the core. Wakes everybody who waits if it changed something."""
        context = self._core.context
        with self._lock, self._core.time.span("busy"):
            self._check(key)
            before = context.changes
            try:
                with self._writing(), context.recording():
                    return action()
            except Exception as error:
                if isinstance(error, DiskFull) or not isinstance(error, AsyncRLError | ValueError):  # not the caller's mistake
                    context.broken = error
                if context.broken is error:
                    raise self._unavailable() from error
                raise
            finally:
                if context.changes != before:
                    self._wake()

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

    async def _poll(self, stream: Stream, key: Key, begin: Callable[[], Poll]) -> Any:
        """Tries again after every change until the poll is done or its deadline passes; then the last reply.

        A call that its own worker abandoned for a newer one does not `begin`, since what it says of its caller is out of date.
        It takes nothing, and its reply is None, which reaches nobody.
        """
        token = object()
        with self._lock:
            self._check(key)
            known, reply = self._replies.get(stream, (None, None))
            if known == key:
                return reply
            newest, _ = self._calls.get(stream, (key, None))
            if (key.incarnation, key.sequence) < (newest.incarnation, newest.sequence):
                return None
            self._calls[stream] = (key, token)
        began = self._clock()
        poll = self._do(key, begin)

        def step() -> tuple[bool, Any, int]:
            self._core.expire()
            if self._calls[stream][1] is not token:
                return True, None, 0
            done, reply = poll.attempt()
            if done:
                self._replies[stream] = (key, reply)
            return done, reply, self._core.context.changes

        while True:
            done, reply, seen = self._do(key, step)
            if done or self._clock() >= began + poll.wait_s:
                return reply
            await self._changed(seen, began + poll.wait_s)

    async def _changed(self, seen: int, deadline: float) -> None:
        """Returns when something changed since `seen`, at the deadline, or when it is time to look at the leases."""
        change = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._closed or self._core.context.changes != seen:
                return
            self._waiters.add(change)
            until = min(deadline, self._clock() + self._core.look_again_s())
        try:
            await asyncio.wait([change], timeout=max(0.0, until - self._clock()))
        finally:  # polls end by the dozen each second while nothing changes
            with self._lock:
                self._waiters.discard(change)

    def _wake(self) -> None:
        """Wakes every call that waits, on whatever event loop. Call it with the lock held."""
        waiters, self._waiters = self._waiters, set()
        for change in waiters:
            if not (loop := change.get_loop()).is_closed():
                loop.call_soon_threadsafe(_resolve, change)


def _resolve(change: "asyncio.Future[None]") -> None:
    if not change.done():
        change.set_result(None)


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
