"""The host's end of the processes that run environments: one that forks, and a fork for each episode, killable by itself."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from asyncrl.config import EpisodeSpec
from asyncrl.episodes.child import LONGEST, AgentEnded, Begun, Engage, Failed, Forked, Reply, Stepped, decode_told
from asyncrl.episodes.environments import Message, Step, Task
from asyncrl.errors import AsyncRLError, ConfigError, Unavailable
from asyncrl.processes import HEADER, OwnedProcess, framed

T = TypeVar("T", Forked, Begun, Stepped, AgentEnded)


class EpisodeFailed(AsyncRLError):
    """The user's code raised, died, or said what nobody can read: it costs its own episode."""


class EpisodePool:
    """Starts episodes. For one event loop. log: where the environments' prints go; None: standard error.

    Raises ConfigError if the environment can't be loaded, Unavailable if that takes longer than start_timeout_s.
    """

    def __init__(self, spec: EpisodeSpec, log: Path | None = None, start_timeout_s: float = 120.0) -> None:
        told = msgspec.json.encode(spec).decode()
        self._command = [spec.python or sys.executable, "-m", "asyncrl.episodes.child", told]
        self._log, self._start_timeout_s = log, start_timeout_s
        self._where = spec.what
        self._idle: list[Running] = []
        self.restarts = -1
        self._open()

    def _open(self) -> None:
        """Starts the process that forks, and waits until it has loaded the environment."""
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs, open(self._log, "ab") if self._log else contextlib.nullcontext() as output:
            self._forker = OwnedProcess(self._command, stdin=theirs, stdout=output or 2, stderr=output)
        self.restarts += 1
        self._control.settimeout(self._start_timeout_s)
        where = f"see {self._log}" if self._log else "see standard error"
        try:
            body = self._control.recv(1 << 16)
        except TimeoutError:
            self.close()
            raise Unavailable(f"episode: {self._where} was not loaded after {self._start_timeout_s:g} s; {where}") from None
        told = decode_told(body) if body else None
        if not isinstance(told, Forked):
            self.close()
            raise ConfigError(told.error if isinstance(told, Failed) else f"episode: {self._where}: died; {where}")

    async def start(self) -> "Running":
        """A process for an episode: one that an episode has left in order, or a new one. A dead forker, which somebody must
        have killed, is replaced."""
        if self._idle:
            return self._idle.pop()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            except OSError:
                self.close()
                self._open()
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        running = Running(self._control, *await asyncio.open_connection(sock=ours))
        try:
            running.pid = (await running.told(Forked)).pid
        except BaseException:
            running.kill()
            raise
        return running

    def done(self, running: "Running", in_order: bool) -> None:
        """Takes a process back, or kills it."""
        if in_order:
            self._idle.append(running)
        else:
            running.kill()

    def close(self) -> None:
        """Kills all of them. Idempotent."""
        while self._idle:
            self._idle.pop().kill()
        self._forker.kill()
        self._control.close()


class Running:
    """One episode's process. Each call waits for its answer; raises EpisodeFailed."""

    def __init__(self, control: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._control, self._reader, self._writer = control, reader, writer
        self.pid = 0
        self.busy_s = 0.0  # in the user's code, since its fork

    async def begin(self, task: Task) -> Begun:
        self._ask(task)
        return await self.told(Begun)

    async def step(self, reply: Message) -> Step:
        self._ask(Reply(reply))
        return (await self.told(Stepped)).step

    async def engage(self, task: Task, base_url: str, api_key: str) -> AgentEnded:
        self._ask(Engage(task, base_url, api_key))
        return await self.told(AgentEnded)

    def _ask(self, message: object) -> None:
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
            return told
        raise EpisodeFailed(told.error if isinstance(told, Failed) else f"the environment's process said {told}")

    def kill(self) -> None:
        """Ends the process and its group, and lets the forker reap it."""
        self._writer.close()
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):  # a forker that has ended took them along
                self._control.send(b"%d" % self.pid)
            self.pid = 0
