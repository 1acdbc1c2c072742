"""The host's end of the processes that run environments: one that forks, and a fork for each episode, killable by itself."""

import asyncio
import contextlib
import socket
import time
from collections import deque
from pathlib import Path
from typing import TypeVar

import msgspec

from asyncrl.config import EpisodeSpec
from asyncrl.episodes.child import AgentEnded, Begun, Close, Engage, Failed, Reply, Stepped, decode_told
from asyncrl.episodes.environments import Message, Step, Task
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.forks import LONGEST, Broken, Died, Forks, Loaded, died
from asyncrl.processes import HEADER, framed

T = TypeVar("T", Loaded, Begun, Stepped, AgentEnded)


class EpisodeFailed(AsyncRLError):
    """The user's code raised, died, or said what nobody can read: it costs its own episode."""


class EpisodePool:
    """Starts episodes. For one event loop. log: where the environments' prints go; None: standard error.

    Raises ConfigError if the environment can't be loaded in start_timeout_s, Unavailable if the process was killed.
    """

    def __init__(self, spec: EpisodeSpec, log: Path | None = None, start_timeout_s: float = 120.0) -> None:
        self._forks = Forks(
            "asyncrl.episodes.child",
            msgspec.json.encode(spec),
            f"episode: {spec.what}",
            python=spec.python,
            log=log,
            start_timeout_s=start_timeout_s,
            memory_bytes=spec.memory_bytes,
        )
        self._idle = deque[Running]()
        self._forks.open()
        if not self._forks.loaded(start_timeout_s):
            raise self._forks.failed(None)

    @property
    def restarts(self) -> int:
        """How often the process that forks was replaced."""
        return self._forks.restarts

    async def start(self) -> "Running":
        """A process for an episode: one that an episode has left in order, or a new one."""
        while self._idle:
            running = self._idle.popleft()  # that has had most time to tidy up
            if await running.wake():
                return running
            running.kill()
        peer = self._forks.fork()
        running = Running(peer, *await asyncio.open_connection(sock=peer))
        try:
            await running.told(Loaded)
        except BaseException:
            running.kill()
            self._forks.loaded(0.0)  # raises if that is why
            raise
        return running

    def done(self, running: "Running") -> None:
        """Takes a process back, and has it close its environment; or kills it in the middle of the user's code."""
        if running.idle:
            running.rest()
            self._idle.append(running)
        else:
            running.kill()

    def close(self) -> None:
        """Kills all of them. Idempotent."""
        while self._idle:
            self._idle.pop().kill()
        self._forks.close()


class Running:
    """One episode's process. Each call waits for its answer; raises EpisodeFailed."""

    def __init__(self, peer: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peer, self._reader, self._writer = peer, reader, writer
        self.busy_s = 0.0  # in the user's code, since its fork
        self.idle = True  # everything was answered
        self._news: asyncio.Future[bytes] | None = None  # while nothing is asked, nothing is to come but its end

    async def begin(self, task: Task) -> Begun:
        self._ask(task)
        return await self.told(Begun)

    async def step(self, reply: Message) -> Step:
        self._ask(Reply(reply))
        return (await self.told(Stepped)).step

    async def engage(self, task: Task, base_url: str, api_key: str) -> AgentEnded:
        self._ask(Engage(task, base_url, api_key))
        return await self.told(AgentEnded)

    def rest(self) -> None:
        """Has it close its environment, until the next episode."""
        self._send(Close())
        self._news = asyncio.ensure_future(self._reader.read(1))

    async def wake(self) -> bool:
        """False: it has died meanwhile."""
        if (news := self._news) is None or news.done():
            return news is None
        self._news = None
        news.cancel()
        await asyncio.wait([news])
        return news.cancelled()

    def _ask(self, message: object) -> None:
        self.idle = False
        self._send(message)

    def _send(self, message: object) -> None:
        self._writer.write(framed(msgspec.msgpack.encode(message)))

    async def told(self, kind: type[T]) -> T:
        began = time.monotonic()
        try:
            size = int.from_bytes(await self._reader.readexactly(HEADER))
            if size > LONGEST:
                raise EpisodeFailed(f"the environment sent {size:,} bytes at once; at most {LONGEST:,} are read")
            told = decode_told(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EpisodeFailed("the environment's process died") from error
        except msgspec.MsgspecError as error:
            raise EpisodeFailed(f"the environment's process sent what can't be read: {error}") from error
        finally:
            self.busy_s += time.monotonic() - began
        if isinstance(told, kind):
            self.idle = True
            return told
        if isinstance(told, Broken):
            raise ConfigError(told.error)
        how = f"the environment's {died(told.code)}" if isinstance(told, Died) else f"the environment's process said {told}"
        raise EpisodeFailed(told.error if isinstance(told, Failed) else how)

    def kill(self) -> None:
        """Ends the process with all that it started."""
        with contextlib.suppress(OSError):  # it has ended
            self._peer.shutdown(socket.SHUT_RDWR)  # which uvloop's transports can't
        if self._news is not None:
            self._news.cancel()
        self._writer.transport.abort()
