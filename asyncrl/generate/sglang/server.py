"""One running SGLang server as the engine sees it: how it is started or found, how weights get in, how its health shows."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from asyncrl.config import UpdateMode
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.client import SGLangClient
from asyncrl.generate.sglang.keys import PrivateFolder, RunningServer
from asyncrl.generate.sglang.process import ServerProcess, free_port
from asyncrl.generate.sglang.transfer import StagedWeights, Transfer
from asyncrl.generate.sglang.wire import FACTS, LOADS, Facts, ServerLoad

log = logging.getLogger(__name__)
LOOK_S = 0.2  # between two looks at a server that is starting
CALL_S = 30.0  # longest that a call which moves no weights may take


class LaunchCommand(NamedTuple):
    """How to start a server."""

    command: tuple[str, ...]  # with all arguments but the port
    env: Mapping[str, str]  # added to this process's environment
    log: Path


class SGLangServer:
    """A server from its start (or from when it was found) to its end. Call it only from the engine's event loop.

    at: how to start one, or one that runs already. transfer: makes its way in for weights, given its tensor-parallel size.
    """

    def __init__(self, at: LaunchCommand | RunningServer, transfer: Callable[[int], Transfer]) -> None:
        self._transfer_of = transfer
        self._process: ServerProcess | None = None
        self._folder: PrivateFolder | None = None
        if isinstance(at, LaunchCommand):
            port, self._folder = free_port(), PrivateFolder()
            command = (*at.command, "--config", str(self._folder.config), "--port", str(port))
            self._process = ServerProcess(command, env={"TMPDIR": str(self._folder.path), **at.env}, log=at.log)
            at = RunningServer(f"http://127.0.0.1:{port}", self._folder.key)
        self.at = at
        self.client = SGLangClient(at.url, at.key)
        self.facts = Facts()
        self.beats = 0  # looks at it while it started, and pieces of weights that it has taken
        self._transfer: Transfer | None = None

    def pids(self) -> list[int]:
        """Its processes, if it is ours."""
        return self._process.pids() if self._process else []

    async def open(self, deadline_s: float) -> None:
        """Waits until the server is healthy. Raises Unavailable, with the end of its log, if it ends or takes too long;
        ConfigError if it takes requests without the key that it should have, or not with ours."""
        deadline = time.monotonic() + deadline_s
        while True:
            self.check_alive()
            try:
                await self.client.check("/health", CALL_S)
                break
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"{self.client.url} is not ready after {deadline_s:g} s ({error}){self._log()}"
                    ) from error
            self.beats += 1
            await asyncio.sleep(LOOK_S)
        if self._process is None:  # whoever updated it last may have died in the middle of that
            await self.client.post("/continue_generation", {}, CALL_S)
        self.facts = await self.client.get("/server_info", FACTS, CALL_S)
        await self._check(self.facts)
        self._transfer = self._transfer_of(self.facts.tp_size)
        await self._transfer.open(functools.partial(self._post_weights, deadline_s=deadline_s))

    async def _check(self, facts: Facts) -> None:
        """Raises ConfigError if it takes requests without its key, or weights could not get into all of it."""
        url = self.client.url
        # What tells the keys is guarded by --api-key alone, as /generate is and whatever else SGLang calls no administration.
        if self.client.key and await self.client.takes_anybody("/server_info", CALL_S):
            raise ConfigError(
                f"{url} takes requests without its key: whoever reaches it could run code on its machine; start it with "
                "--api-key (--admin-api-key alone leaves this open), and if it was, with a newer starlette"
            )
        if (facts.dp_size, facts.pp_size) != (1, 1):
            raise ConfigError(
                f"{url} runs with data parallel {facts.dp_size}, pipeline parallel {facts.pp_size}: weights would reach only a "
                "part of its processes; start it without these, and more servers in place of data parallel ones"
            )

    def require(self, mode: UpdateMode) -> None:
        """Raises ConfigError if this server could not label its tokens truly in an update of this mode."""
        flags = {
            "--disable-radix-cache": self.facts.disable_radix_cache,  # a prompt cached under old weights
            "--disable-overlap-schedule": self.facts.disable_overlap_schedule,  # the step in flight
        }
        missing = [flag for flag, is_set in flags.items() if not is_set]
        if mode == "keep_kv" and missing:
            raise ConfigError(
                f"{self.client.url} runs without {' and '.join(missing)}, and engine.update_mode is 'keep_kv': tokens of old "
                "weights would be labelled as new; start it with these flags, or use update_mode: in_flight"
            )

    def check_alive(self) -> None:
        """Raises Unavailable if a process of it has died."""
        if self._process is not None and not self._process.alive():
            raise Unavailable(f"the SGLang server at {self.client.url} died{self._log()}")

    def _log(self) -> str:
        return f"; the end of its log:\n{self.client.masked(self._process.log_tail())}" if self._process else ""

    async def load(self) -> ServerLoad:
        """How busy it is."""
        ranks = (await self.client.get("/v1/loads?include=core", LOADS, CALL_S)).loads
        return ranks[0] if ranks else ServerLoad()

    async def probe(self, deadline_s: float) -> None:
        """Has it generate a token. Raises Unavailable if it doesn't."""
        await self.client.post(
            "/generate", {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "ignore_eos": True}}, deadline_s
        )

    async def update(self, staged: StagedWeights, deadline_s: float) -> None:
        """Takes the staged weights while nothing of it is computing: when it is idle, or paused. Raises Unavailable if it has
        not in `deadline_s`."""
        assert self._transfer is not None
        try:
            async with asyncio.timeout(deadline_s):
                await self._transfer.send(functools.partial(self._post_weights, deadline_s=deadline_s), staged)
        except TimeoutError as error:
            raise Unavailable(
                f"{self.client.url} did not take weights {staged.version} in {deadline_s:g} s; if it only is slow, raise "
                "limits.update_timeout_s"
            ) from error

    async def _post_weights(self, path: str, body: dict[str, Any], deadline_s: float) -> Any:
        reply = await self.client.post(path, body, deadline_s)
        if not (isinstance(reply, dict) and reply.get("success") is True):
            raise Unavailable(f"{self.client.url}{path}: the response does not say whether it took the weights")
        self.beats += 1
        return reply

    async def close(self) -> None:
        """Ends the server if it is ours; whoever waits for it gets Unavailable. Idempotent."""
        await self.client.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.kill)
            if self._process.exit_code() is None:
                log.warning("the SGLang server at %s was killed and has not ended: it may still hold its GPU", self.client.url)
        if self._folder is not None:
            self._folder.close()
        if self._transfer is not None:
            await self._transfer.close()
