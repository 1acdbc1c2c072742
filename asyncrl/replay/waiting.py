"""Waiters on several event loops, woken from any thread."""

import asyncio


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
