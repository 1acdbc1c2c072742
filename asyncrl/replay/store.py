"""The replay store as an actor: long polls over the synchronous core, and the log below it.

Who waits for whom: generators in `reserve` (for room or a cancellation), reward workers in `lease_unscored`
(for rows), the learner in `lease_batch` (for ready groups). Every other call answers at once. All waits end at their
deadline; every change of state wakes all of them; a lease that runs out wakes them too.

Rows come and go as Arrow IPC bytes that the callers encode and decode; everything else is a small struct. Calls may run on
several event loops in several threads (Ray gives each concurrency group its own), so that long polls never starve a commit.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

import asyncrl.replay.log.rows as schema
from asyncrl.errors import AsyncRLError, Closed, Fenced, Unavailable
from asyncrl.replay.admission import TOO_OLD
from asyncrl.replay.core import Core
from asyncrl.replay.log.log import ReplayLog, locked
from asyncrl.replay.log.rows import LogSettings, RowLease, TrainRows
from asyncrl.replay.plan import StorePlan
from asyncrl.report.timing import TimeInState
from asyncrl.types import BatchLease, Fence, Key, Reserved, Score, StoreReport, Version

# ------------------------------------------------------------------------------------------- waiting
# Waiters on several event loops, woken from any thread.


class Waiters:
    """Not locked by itself: `add` and `wake` are called under the owner's lock, so that no change falls between them."""

    def __init__(self) -> None:
        self._futures: set[asyncio.Future[None]] = set()

    def add(self) -> "asyncio.Future[None]":
        """A future on the running loop that the next `wake` resolves."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures.add(future)
        return future

    def discard(self, future: "asyncio.Future[None]") -> None:
        self._futures.discard(future)

    def wake(self) -> None:
        futures, self._futures = self._futures, set()
        for future in futures:
            loop = future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)

    def __len__(self) -> int:
        return len(self._futures)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


T = TypeVar("T")
_LOCK_WAIT_S = 10.0  # for a predecessor that was killed a moment ago


class ReplayStore:
    """Opens the log and rebuilds its state from it. clock: monotonic seconds, for leases and deadlines."""

    def __init__(self, plan: StorePlan, log: LogSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._keep_all = log.keep_segments == "all"
        self._folder = locked(Path(log.folder), _LOCK_WAIT_S)
        self._log = ReplayLog(Path(log.folder), log.segment_bytes, log.fsync)
        self._core = Core(plan, self._log.append_events, self._log.history, clock)
        self._log.history = []
        self._clock = clock
        self._lock = threading.Lock()
        self._ledger = TimeInState("wait:calls")  # written under the lock
        self._waiters = Waiters()
        self._closed = False
        self._seen: dict[str, int] = dict(self._core.ledger.workers)  # newest incarnation of each worker
        self._calls: dict[tuple[str, str], tuple[Key, object]] = {}  # newest call of each worker, by method
        self._answers: dict[tuple[str, str], tuple[Key, Any]] = {}

    # ------------------------------------------------------------------------------------- generators

    async def reserve(self, key: Key, k: int, version: Version, held: Sequence[int], wait_s: float) -> Reserved:
        """Waits until there is a ticket or a cancellation; the long poll itself counts as a sign of life.

        Answers at once that the weights are too old: the caller must swap, which it can't while it waits here.
        """

        def arrive() -> None:
            self._core.arrive(key.worker, key.incarnation, held)

        def attempt() -> tuple[bool, Reserved]:
            answer = self._core.reserve(k, key.worker, key.incarnation, version, held)
            done = answer.tickets or answer.cancelled or answer.ended or answer.waiting_for == TOO_OLD
            return bool(done), answer

        return await self._poll("reserve", key, attempt, Reserved(), min(wait_s, self._plan.lease_s / 2), arrive)

    async def submit(self, key: Key, rows: bytes) -> None:
        """Arrow rows of schema.ROWS. Answers when the operating system has them; rows that came too late are ignored."""
        batch = schema.from_ipc(rows)
        schema.check_schema(batch)
        summaries = schema.summaries(batch)

        def take() -> None:
            accepted = self._core.acceptable(summaries, key.worker)
            if accepted:
                first = self._log.append_rows(batch if len(accepted) == batch.num_rows else batch.take(accepted))
                self._core.submit([summaries[i] for i in accepted], first)

        self._do(key, take)

    # ----------------------------------------------------------------------------------------- reward

    async def lease_unscored(self, key: Key, k: int, wait_s: float) -> RowLease:
        """Waits for the first row without a score."""

        def attempt() -> tuple[bool, RowLease]:
            lease, rows = self._core.lease_unscored(k, key.worker, key.incarnation)
            if not rows:
                return self._core.ended(), RowLease(0, self._plan.lease_s, ended=self._core.ended())
            return True, RowLease(lease, self._plan.lease_s, schema.to_ipc(self._log.take(rows, schema.UNSCORED_COLUMNS)))

        return await self._poll("lease_unscored", key, attempt, RowLease(0, self._plan.lease_s), wait_s)

    async def extend(self, key: Key, lease: int) -> None:
        self._do(key, lambda: self._core.extend(lease, key.worker))

    async def score(self, key: Key, lease: int, scores: Sequence[Score]) -> None:
        """A rollout whose tokens earned something is written once more, with it: that row counts from then on."""

        def take() -> None:
            first, earning = 0, self._core.earning(scores)
            if earning:
                rows = self._log.take([row for row, _ in earning], schema.ROWS.names)
                first = self._log.append_rows(schema.with_token_rewards(rows, [earned for _, earned in earning]))
            self._core.score(lease, scores, first)

        self._do(key, take)

    # ---------------------------------------------------------------------------------------- learner

    async def fence(self, key: Key, committed: int) -> Fence:
        known, answer = self._known("fence", key)
        if known:
            return answer
        fence = self._do(key, lambda: self._core.fence(committed))
        self._answers["fence", key.worker] = (key, fence)
        return fence

    async def lease_batch(self, key: Key, incarnation: int, update: int, wait_s: float) -> BatchLease:
        """Waits for a batch. Asking again for the same update answers the same lease, so a lost answer loses nothing."""

        def attempt() -> tuple[bool, BatchLease]:
            answer = self._core.lease_batch(incarnation, update)
            return bool(answer.groups or answer.ended), answer

        empty = BatchLease(lease=0, groups=(), committed=self._core.ledger.committed)
        return await self._poll("lease_batch", key, attempt, empty, wait_s)

    async def rows(self, key: Key, incarnation: int, groups: Sequence[int]) -> TrainRows:
        def read() -> TrainRows:
            found = self._core.rows(incarnation, groups)
            batch = self._log.take([row for row, _ in found], schema.TRAIN_COLUMNS)
            return TrainRows(schema.to_ipc(batch), [score for _, score in found])

        return self._do(key, read)

    async def commit(self, key: Key, lease: int, version: Version, metrics: Mapping[str, float]) -> None:
        self._do(key, lambda: self._core.commit(lease, version, metrics))

    async def request_eval(self, key: Key, version: Version) -> None:
        self._do(key, lambda: self._core.request_eval(version))

    async def checkpointed(self, key: Key, oldest_retained: int) -> None:
        """Also deletes the segments that no retained checkpoint needs."""

        def note() -> None:
            self._core.checkpointed(oldest_retained)
            if not self._keep_all:
                self._log.truncate(self._wanted())

        self._do(key, note)

    # ------------------------------------------------------------------------------------ supervision

    async def finish(self) -> None:
        """The run is over: evicts what is outstanding; generators and reward workers are told, after the evaluations."""
        self._do(None, self._core.finish)

    async def forget(self, worker: str, incarnation: int) -> None:
        """This incarnation is dead: others get its work at once, and its calls that still wait here take nothing."""

        def free() -> None:
            self._seen[worker] = max(self._seen.get(worker, 0), incarnation + 1)
            self._core.forget(worker, incarnation)

        self._do(None, free)

    async def report(self, since: int) -> StoreReport:
        """What the driver needs for its metrics: each record after sequence `since` once, in order, whoever restarted."""

        return replace(self._do(None, lambda: self._core.report(since)), seconds=self._ledger.seconds())

    async def state(self) -> dict[str, Any]:
        """A dump for the watchdog."""
        return self._do(None, self._core.state)

    async def close(self) -> None:
        """Hands everything to the disk. Calls that still come, or wait, raise `Closed`."""
        with self._lock:
            if not self._closed:
                self._log.close()
                self._folder.close()
            self._closed = True
            self._waiters.wake()

    # ---------------------------------------------------------------------------------------- helpers

    def _do(self, key: Key | None, action: Callable[[], T]) -> T:
        """Runs one step of the core. Wakes everybody who waits if it changed something."""
        with self._lock, self._ledger.span("busy"):
            self._check(key)
            before = self._core.changes
            try:
                return action()
            except (AsyncRLError, ValueError) as error:
                if self._core.broken is error:
                    raise self._unavailable() from error
                raise
            except Exception as error:
                self._core.broken = error
                raise self._unavailable() from error
            finally:
                if self._core.changes != before:
                    self._waiters.wake()

    def _unavailable(self) -> Unavailable:
        broken = self._core.broken
        return Unavailable(
            f"the replay store stopped at its first failed write or keep function ({type(broken).__name__}: {broken}); "
            "what was acknowledged is in the log; free disk space or mend the function, then restart the store"
        )

    def _check(self, key: Key | None) -> None:
        if self._closed:
            raise Closed("the replay store is closed: the run has stopped")
        if self._core.broken is not None:
            raise self._unavailable()
        if key is None:
            return
        newest = self._seen.get(key.worker, 0)
        if key.incarnation < newest:
            raise Fenced(f"{key.worker} incarnation {key.incarnation} < {newest}: a newer one took over; stop")
        self._seen[key.worker] = key.incarnation

    def _known(self, method: str, key: Key) -> tuple[bool, Any]:
        """Whether this very call was answered already, and the answer."""
        with self._lock:
            self._check(key)
            found = self._answers.get((method, key.worker))
            return (True, found[1]) if found is not None and found[0] == key else (False, None)

    async def _poll(
        self,
        method: str,
        key: Key,
        attempt: Callable[[], tuple[bool, T]],
        empty: T,
        wait_s: float,
        begin: Callable[[], None] = lambda: None,
    ) -> T:
        """Tries again after every change until `attempt` is done or the deadline passes; then its last answer.

        A repeated call answers as before. A call that its own worker gave up for a newer one takes nothing any more, nor
        does it `begin`: what it says of its caller is out of date.
        """
        known, answer = self._known(method, key)
        if known:
            return answer
        stream, deadline, token = (method, key.worker), self._clock() + wait_s, object()
        if not self._newest(stream, key, token):
            return empty
        self._do(key, begin)

        def step() -> tuple[bool, T, int]:
            self._core.expire()
            if self._calls[stream][1] is not token:
                return True, empty, 0
            done, answer = attempt()
            if done:
                self._answers[stream] = (key, answer)
            return done, answer, self._core.changes

        while True:
            done, answer, seen = self._do(key, step)
            if done or self._clock() >= deadline:
                return answer
            await self._changed(seen, deadline)

    def _newest(self, stream: tuple[str, str], key: Key, token: object) -> bool:
        """Makes this the newest call of its stream; False if a newer one came before it."""
        with self._lock:
            newest, _ = self._calls.get(stream, (key, None))
            if (key.incarnation, key.sequence) < (newest.incarnation, newest.sequence):
                return False
            self._calls[stream] = (key, token)
            return True

    async def _changed(self, seen: int, deadline: float) -> None:
        """Returns when something changed since `seen`, at the deadline, or when a lease runs out."""
        with self._lock:
            if self._closed or self._core.changes != seen:
                return
            future = self._waiters.add()
            expires = self._core.next_deadline()
        until = deadline if expires is None else min(deadline, expires)
        try:
            await asyncio.wait([future], timeout=max(0.0, until - self._clock()))
        finally:
            with self._lock:
                self._waiters.discard(future)

    def _wanted(self) -> Collection[int]:
        ledger = self._core.ledger
        trained = (g.id for c in ledger.commits.values() for g in c.groups)
        return {*ledger.groups, *trained, *(ledger.round.groups if ledger.round else ())}


# --------------------------------------------------------------------------------------------- local
# The store in this process, for who composes the stages by hand: a transport without Ray.


class LocalTransport:
    """Runs a ReplayStore on an event loop in a thread of its own; any thread may call. `close` ends both."""

    def __init__(self, store: ReplayStore) -> None:
        self._store = store
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replay-store", daemon=True)
        self._thread.start()

    def __call__(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Blocks for the answer. Raises Unavailable after `timeout_s`; the store's own errors pass."""
        future = asyncio.run_coroutine_threadsafe(getattr(self._store, method)(*args), self._loop)
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            future.cancel()
            raise Unavailable(f"store: no answer to {method} within {timeout_s:g} s") from None

    def close(self) -> None:
        self("close", timeout_s=60.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
