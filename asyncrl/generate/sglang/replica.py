"""One place in the engine for a server: brings one up, hands it rows, swaps its weights, and replaces it when it dies."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from asyncrl.config import EngineSpec, LimitsSpec
from asyncrl.errors import AsyncRLError, ConfigError, Unavailable
from asyncrl.generate.sglang.client import request_id
from asyncrl.generate.sglang.segments import RequestRow
from asyncrl.generate.sglang.server import CALL_S, SGLangServer
from asyncrl.generate.sglang.transfer import StagedWeights
from asyncrl.generate.sglang.wire import Chunk, ServerLoad
from asyncrl.loops import Changes
from asyncrl.types import FinishReason, Generation, SwapReport, Version

log = logging.getLogger(__name__)
WATCH_S = 0.5  # between two looks at a server that serves
AGAIN_S = 0.1  # an abort misses requests that the server has not yet read: repeated until all have ended
MAX_LOSSES = 3  # deaths in a row without one finished rollout in between: then it is not chance
Settle = Callable[[RequestRow, Generation | AsyncRLError], None]


@dataclass
class ServerCounters:
    """What happened to the servers of an engine, and to the rollouts on them, since its start."""

    tokens: int = 0  # reported by servers
    restarts: int = 0  # servers replaced
    resumed: int = 0  # rollouts that went on after the loss of their server, with the tokens so far
    reissued: int = 0  # rollouts regenerated from the prompt after it
    lost_tokens: int = 0  # computed again because of it
    interrupted: int = 0  # rollouts that had to leave their server for an update
    retracted: int = 0  # times that a server took a rollout out of its batch for want of KV cache
    recovery_s: float = 0.0  # last loss of a server: until it served again

    def gauges(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items()}


class Replica:
    """One server after the other. Call it only from the engine's event loop."""

    def __init__(
        self,
        make: Callable[[], SGLangServer],
        spec: EngineSpec,
        limits: LimitsSpec,
        *,
        staged: StagedWeights,
        changes: Changes,
        counters: ServerCounters,
    ) -> None:
        self.up = False  # whether its server may be given rows
        self.version: Version | None = None
        self.load = ServerLoad()
        self.server: SGLangServer | None = None
        self.rows: set[RequestRow] = set()  # on the server
        self._make, self._mode, self._stream_interval = make, spec.update_mode, spec.stream_interval
        # After so long a silence the server must generate a token, in as long again, or is replaced.
        self._probe_s, self._start_timeout_s = limits.health_timeout_s / 2, limits.start_timeout_s
        self._update_timeout_s = limits.update_timeout_s
        self._staged, self._changes, self._counters = staged, changes, counters
        self._lost: Unavailable | None = None  # why the present server is not to be trusted any more
        # Since when no server serves, in monotonic seconds; None before the first one does, and while one does.
        self._lost_at: float | None = None
        self._interrupting = False  # rows have to leave, and will go on later
        # Held by a look at the server's health, or by an update: a server that takes weights answers nothing else.
        self._busy = asyncio.Lock()
        self._losses = 0  # in a row
        self._served = False  # a server came up once
        self._heard = time.monotonic()  # last sign of life

    # ------------------------------------------------------------------------------------------- life

    async def keep(self, updating: asyncio.Lock) -> None:
        """Never returns: makes a server, brings it up to date, watches it, and replaces it. Raises when that is in vain.

        updating: held while weights go in, so that a server which comes up does not race a swap.
        """
        while True:
            self._lost = None
            self.server = server = self._make()
            try:
                await server.open(self._start_timeout_s)
                server.require(self._mode)
                async with updating:
                    if self._staged.version is not None:
                        await server.update(self._staged, self._update_timeout_s)
                    self.version = self._staged.version
                    self._rise()
                await self._watch(server)
            except Unavailable as error:
                self._fall(server, error)
            finally:
                self.up = False
                await server.close()
            self._losses += 1
            assert self._lost is not None
            if not self._served or self._losses > MAX_LOSSES:
                raise self._lost
            self._counters.restarts += 1
            log.warning("a server is replaced: %s", self._lost)

    def _rise(self) -> None:
        self.up = self._served = True
        self._heard = time.monotonic()
        if self._lost_at is not None:
            self._counters.recovery_s, self._lost_at = self._heard - self._lost_at, None
        self._changes.notify()

    def _fall(self, server: SGLangServer, error: Unavailable) -> None:
        """The server is not to be trusted any more; `keep` replaces it."""
        if server is not self.server:  # news of its predecessor
            return
        self._lost = self._lost or error
        self._lost_at = self._lost_at or time.monotonic()
        self.up = False
        self._changes.notify()

    async def _watch(self, server: SGLangServer) -> None:
        """Never returns: raises Unavailable when the server is lost, dies, or is silent and can't generate a token."""
        while True:
            await self._changes.until(lambda: self._lost is not None, WATCH_S)
            if self._lost is not None:
                raise self._lost
            server.check_alive()
            if not self._busy.locked():  # an update has a limit of its own
                async with self._busy:
                    await self._look(server)

    async def _look(self, server: SGLangServer) -> None:
        self.load = await server.load()
        await self.cancel(self.rows)  # again: it misses requests that the server had not yet read
        if time.monotonic() - self._heard > self._probe_s and not self._interrupting:
            await server.probe(self._probe_s)
            self._heard = time.monotonic()

    async def close(self) -> None:
        if self.server is not None:
            await self.server.close()

    # ---------------------------------------------------------------------------------------- serving

    async def segment(self, rows: Sequence[RequestRow], settle: Settle) -> None:
        """Has the server take the rows further; returns when it has ended each, for good or for now, or is lost.

        Rows that are neither settled nor cancelled go on in another segment.
        """
        server, version = self.server, self.version
        assert server is not None
        assert version is not None
        for row in rows:
            row.begin(version)
        self.rows.update(rows)
        salt = None if server.facts.disable_radix_cache else str(version)
        try:
            async for chunk in server.client.generate(rows, salt=salt, stream_interval=self._stream_interval):
                self._heard = time.monotonic()
                row = rows[chunk.index]
                if (reason := self._take(row, chunk)) is not None:
                    self._leave([row])
                    if reason != "abort" or row.cancelled or not self._interrupting:
                        self._losses = 0
                        settle(row, row.generation(reason))
                        if reason == "abort":
                            self._explain(row, chunk)
        except Unavailable as error:
            self._fall(server, error)
            self._count_losses(self.rows.intersection(rows))
        except ConfigError as error:
            for row in rows:
                settle(row, error)
        finally:
            self._leave(rows)

    def _take(self, row: RequestRow, chunk: Chunk) -> FinishReason | None:
        before = len(row.token_ids)
        try:
            reason = row.extend(chunk)
        except Unavailable:
            for other in self.rows:
                other.distrust()
            raise
        self._counters.tokens += len(row.token_ids) - before
        if reason is None:
            row.tell(self._stream_interval)
        if reason is not None:  # a swap retracts too, but not for want of cache
            self._counters.retracted += max(0, chunk.meta_info.num_retractions - row.swaps)
        return reason

    def _leave(self, rows: Sequence[RequestRow]) -> None:
        self.rows.difference_update(rows)
        self._changes.notify()

    def _count_losses(self, rows: set[RequestRow]) -> None:
        """Counts what of each row survives its server."""
        for row in rows:
            self._counters.lost_tokens += row.lost()
            if row.token_ids:
                self._counters.resumed += 1
            else:
                self._counters.reissued += 1

    @staticmethod
    def _explain(row: RequestRow, chunk: Chunk) -> None:
        finish = chunk.meta_info.finish_reason
        if finish is not None and finish.type == "abort" and not row.cancelled:
            log.warning("the server aborted request %s: %s", row.request.id, finish.message)

    async def cancel(self, rows: Iterable[RequestRow]) -> None:
        """Tells the server which of these nobody wants any more, as far as they are its own."""
        for request in [request_id(row) for row in rows if row.cancelled and row in self.rows]:
            await self._abort({"rid": request})

    async def _abort(self, whom: dict[str, str | bool]) -> None:
        server = self.server
        if server is None or not self.up:
            return
        try:
            await server.client.post("/abort_request", whom, CALL_S)
        except Unavailable as error:
            self._fall(server, error)

    # ---------------------------------------------------------------------------------------- weights

    async def swap(self, version: Version) -> SwapReport:
        """Takes the staged weights. A server that fails at it is lost, and replaced; that is no error here."""
        server = self.server
        assert server is not None
        # It was silent for want of work; from here on it has some.
        self._heard = started = time.monotonic()
        recomputed = discarded = 0
        # A request that SGLang retracts would find the KV of its prompt in the cache, of the old weights: it has to leave. So
        # has one that is told of: only the end of its segment would say which of its tokens came before the swap.
        told = any(row.told is not None for row in self.rows)
        leaves = self._mode == "in_flight" and (told or not server.facts.disable_radix_cache)
        try:
            if self._mode == "drain":
                await self._changes.until(self._idle)
                started = time.monotonic()
                await self._update(server)
            elif leaves or self._mode == "restart":
                unfinished = await self.interrupt()
                if self._mode == "restart":
                    discarded = sum(row.restart() for row in unfinished)
                recomputed = sum(row.length for row in unfinished)
                await self._update(server)
            else:
                for row in self.rows:
                    row.swapping(version)
                recomputed = 0 if self._mode == "keep_kv" else sum(row.length for row in self.rows)
                await self._update(server, pause="in_place" if self._mode == "keep_kv" else "retract")
            self.version = version
        except Unavailable as error:
            self._fall(server, error)
        return SwapReport(
            version=version,
            pause_s=time.monotonic() - started,
            recomputed_tokens=recomputed,
            discarded_tokens=discarded,
        )

    async def _update(self, server: SGLangServer, pause: Literal["", "in_place", "retract"] = "") -> None:
        """Has the server take the staged weights. pause: SGLang keeps the requests meanwhile; `retract` frees their KV cache,
        so that it is computed again, `in_place` leaves it.

        Never with flush_cache: SGLang's scheduler dies of it while requests wait.
        """
        async with self._busy:
            if pause:
                await server.client.post("/pause_generation", {"mode": pause}, CALL_S)
            await server.update(self._staged, self._update_timeout_s)
            if pause:
                await server.client.post("/continue_generation", {}, CALL_S)
            self._heard = time.monotonic()

    def _idle(self) -> bool:
        """Whether no row is on the server; or it is lost, and its rows are leaving."""
        return not (self.rows and self.up)

    async def interrupt(self) -> list[RequestRow]:
        """Has all rows leave the server, to go on later; waits until they have. Returns the unfinished ones.

        A server that does not let go of them is lost, as is one that dies meanwhile; that is no error here.
        """
        running, server, deadline = list(self.rows), self.server, time.monotonic() + self._probe_s
        self._interrupting = True
        try:
            while not self._idle():
                await self._abort({"abort_all": True})
                await self._changes.until(self._idle, AGAIN_S)
                if not self._idle() and time.monotonic() > deadline and server is not None:
                    text = f"{server.client.url} did not end {len(self.rows)} aborted requests in {self._probe_s:g} s"
                    self._fall(server, Unavailable(text))
        finally:
            self._interrupting = False
        interrupted = [row for row in running if not row.done]
        self._counters.interrupted += len(interrupted)
        return interrupted
