"""Waiting inside one event loop for whatever has become true."""

import asyncio
from collections.abc import Callable


class Changes:
    """`notify` after every change; `until` looks again each time. Of one loop only."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds; whoever needs a deadline puts `asyncio.timeout` around it."""
        while not condition():
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)
