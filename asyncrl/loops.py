"""An event loop in a thread of its own: others hand work in and get futures out, until it has ended for a reason."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from asyncrl.errors import AsyncRLError, Closed, Unavailable

T = TypeVar("T")


class Changes:
    """Waiting inside one event loop for whatever has become true. Call it only from that loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Call it after every change: whoever waits looks again."""
        self._changed.set()  # wakes all who wait now
        self._changed.clear()

    async def next(self) -> None:
        """Returns at the next `notify`."""
        await self._changed.wait()

    async def until(self, condition: Callable[[], object], timeout_s: float | None = None) -> None:
        """Returns once the condition holds, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self.next()


class LoopThread:
    """Thread-safe, except `spawn` and `changes`: use these only from the loop. `on_end` is called in the loop's thread (before
    the loop runs, in that of whoever ends it) with the first reason, each time that `end` is called."""

    def __init__(self, name: str, on_end: Callable[[AsyncRLError], None] = lambda reason: None) -> None:
        self.changes = Changes()
        self.ended: AsyncRLError | None = None
        self._name, self._on_end = name, on_end
        self._lock = threading.Lock()  # between `ended` and what is handed in
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # spawned, and not at their end
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Runs what was handed in so far, and what comes."""
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def call(self, function: Callable[..., object], *arguments: Any) -> AsyncRLError | None:
        """Has the loop call `function` soon. Returns why not, if the loop has ended."""
        with self._lock:
            if self.ended is None:
                self._loop.call_soon_threadsafe(function, *arguments)
            return self.ended

    def ask(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Runs `work` in the loop. The future raises why the loop ended, if it ends first; this call, if it has ended."""
        with self._lock:
            if self.ended is None and self._thread.is_alive():
                return asyncio.run_coroutine_threadsafe(self._unless_ended(work), self._loop)
        work.close()
        raise self.ended or Closed(f"{self._name} was not started")

    async def _unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._loop.create_task(work)
        end = self._loop.create_task(self.changes.until(lambda: self.ended is not None))
        await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if not task.done():
            task.cancel()
            assert self.ended is not None
            raise self.ended
        return task.result()

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Runs `work` beside everything else. What it raises ends the loop."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, AsyncRLError):
            failure = Unavailable(f"{self._name} failed: {type(error).__name__}: {error}; restart it")
            failure.__cause__ = error
            error = failure
        self.end(error)

    def end(self, reason: AsyncRLError) -> None:
        """No more work is taken, and what is asked for raises the first reason."""
        with self._lock:
            self.ended = self.ended or reason
        self._on_end(self.ended)
        self.changes.notify()

    def close(self, reason: AsyncRLError, last: Callable[[], Coroutine[Any, Any, object]], deadline_s: float) -> None:
        """Ends the loop: cancels all that was spawned, runs `last`, and waits for the thread. Idempotent."""
        if not self._thread.is_alive():
            self.end(reason)
            return
        asyncio.run_coroutine_threadsafe(self._close(reason, last), self._loop).result(deadline_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(deadline_s)

    async def _close(self, reason: AsyncRLError, last: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self.end(reason)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await last()
