"""The store in this process, for who composes the stages by hand: a transport without Ray."""

import asyncio
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from asyncrl.errors import Unavailable
from asyncrl.replay.store import ReplayStore


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
