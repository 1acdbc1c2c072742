"""One place in the engine for a server: brings one up, hands it rows, swaps its weights, and replaces it when it dies."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from asyncrl.config import UpdateMode
from asyncrl.errors import AsyncRLError, ConfigError, Unavailable
from asyncrl.generate.sglang.client import request_id
from asyncrl.generate.sglang.loop import Changes
from asyncrl.generate.sglang.router import Router
from asyncrl.generate.sglang.segments import Chunk, Row
from asyncrl.generate.sglang.server import CALL_S, Core, Server
from asyncrl.generate.sglang.transfer import StagedWeights
from asyncrl.generate.sglang.window import Load, Window
from asyncrl.types import FinishReason, Generation, SwapReport, Version

# -------------------------------------------------------------------------------------------- counts
# What befell the servers of an engine, and the rollouts on them.


@dataclass
class Counts:
    """Over all replicas of an engine, since its start."""

    tokens: int = 0  # reported by servers
    restarts: int = 0  # servers replaced
    resumed: int = 0  # rollouts that went on after the loss of their server, with the tokens so far
    reissued: int = 0  # rollouts that began anew after it
    lost_tokens: int = 0  # computed again because of it
    interrupted: int = 0  # rollouts that had to leave their server for an update
    retracted: int = 0  # times that a server took a rollout out of its batch for want of KV cache
    recovery_s: float = 0.0  # last loss of a server: until it served again

    def gauges(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items()}


log = logging.getLogger(__name__)
WATCH_S = 0.5  # between two looks at a server that serves
AGAIN_S = 0.1  # an abort misses requests that the server has not yet read: repeated until all have ended
MAX_LOSSES = 3  # deaths in a row without one finished rollout in between: then it is not chance
Settle = Callable[[Row, Generation | AsyncRLError], None]


class Settings(NamedTuple):
    """slots: requests per server, at most; `least`: at least, however short its KV cache is. mode: see deployment.EngineSpec.

    stream_interval: tokens between two reports of a request. probe_s: silence after which a server must generate a token, in
    as long again, or is replaced. start_timeout_s: how long a server may take to be ready.
    """

    slots: int
    least: int = 1
    mode: UpdateMode = "in_flight"
    stream_interval: int = 64
    probe_s: float = 30.0
    start_timeout_s: float = 180.0


class Replica:
    """Of the engine's loop only. `up` while its server may be given rows."""

    def __init__(
        self,
        index: int,
        make: Callable[[], Server],
        settings: Settings,
        *,
        staged: StagedWeights,
        router: Router,
        changes: Changes,
        counts: Counts,
    ) -> None:
        self.index, self.window = index, Window(settings.slots, min(settings.least, settings.slots))
        self.load = Core()
        self.version: Version | None = None
        self.up = False
        self._make, self._settings, self._mode = make, settings, settings.mode
        self._staged, self._router, self._changes, self._counts = staged, router, changes, counts
        self.server: Server | None = None
        self._rows: set[Row] = set()
        self._lost: Unavailable | None = None
        self._lost_at: float | None = None
        self._emptying = False
        self._losses = 0
        self._served = False
        self._heard = time.monotonic()
        self._retracted = 0

    # ------------------------------------------------------------------------------------------- life

    async def keep(self, updating: asyncio.Lock) -> None:
        """For ever: a server, brought up to date, watched, and replaced. Raises when that is in vain.

        updating: held while weights go in, so that a server which comes up does not race a swap.
        """
        while True:
            self._lost = None
            self.server = server = self._make()
            try:
                await server.open(self._settings.start_timeout_s)
                server.require(self._mode)
                async with updating:
                    if self._staged.version is not None:
                        await server.update(self._staged)
                    self.version = self._staged.version
                    self._rise()
                await self._watch(server)
            except Unavailable as error:
                self._fall(server, error)
            finally:
                self.up = False
                self._router.down(self.index)
                await server.close()
            self._losses += 1
            assert self._lost is not None
            if not self._served or self._losses > MAX_LOSSES:
                raise self._lost
            self._counts.restarts += 1
            log.warning("server %d is replaced: %s", self.index, self._lost)

    def _rise(self) -> None:
        self.up = self._served = True
        self._heard = time.monotonic()
        if self._lost_at is not None:
            self._counts.recovery_s, self._lost_at = self._heard - self._lost_at, None
        self._router.up(self.index)
        self._changes.notify()

    def _fall(self, server: Server, error: Unavailable) -> None:
        """The server is not to be trusted any more; `keep` replaces it."""
        if server is not self.server:  # news of its predecessor
            return
        self._lost = self._lost or error
        self._lost_at = self._lost_at or time.monotonic()
        self.up = False
        self._router.down(self.index)
        self._changes.notify()

    async def _watch(self, server: Server) -> None:
        """Returns never: raises Unavailable when the server is lost, dies, or is silent and can't generate a token."""
        while True:
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._changes.until(lambda: self._lost is not None)
            except TimeoutError:
                pass
            if self._lost is not None:
                raise self._lost
            server.check_alive()
            self.load = await server.load()
            self._adapt()
            await self.cancel()  # again: it misses requests that the server had not yet read
            if time.monotonic() - self._heard > self._settings.probe_s and not self._emptying:
                await server.probe(self._settings.probe_s)
                self._heard = time.monotonic()

    def _adapt(self) -> None:
        """Has the window follow the server's load."""
        self.window.observe(
            Load(
                running=self.load.num_running_reqs,
                waiting=self.load.num_waiting_reqs,
                kv_usage=self.load.token_usage,
                retracted=self._retracted,
                in_flight=len(self._rows),
            )
        )
        self._counts.retracted += self._retracted
        self._retracted = 0
        self._router.set_window(self.index, self.window.slots)

    async def close(self) -> None:
        if self.server is not None:
            await self.server.close()

    # ---------------------------------------------------------------------------------------- serving

    async def segment(self, rows: Sequence[Row], settle: Settle) -> None:
        """Has the server take the rows further; returns when it has ended each, for good or for now, or is lost.

        Rows that are neither settled nor cancelled go on in another segment.
        """
        server, version = self.server, self.version
        assert server is not None
        assert version is not None
        for row in rows:
            row.begin(version)
        self._rows.update(rows)
        self._router.began(self.index, len(rows))
        salt = None if server.facts.disable_radix_cache else str(version)
        try:
            async for chunk in server.client.generate(rows, salt=salt, stream_interval=self._settings.stream_interval):
                self._heard = time.monotonic()
                row = rows[chunk.index]
                reason = self._take(row, chunk)
                if reason is not None:
                    # A swap retracts too, but not for want of cache.
                    self._retracted += max(0, chunk.meta_info.num_retractions - row.swaps)
                    self._leave(row)
                    if reason != "abort" or row.cancelled or not self._emptying:
                        self._losses = 0
                        settle(row, row.generation(reason))
                        self._explain(row, chunk.meta_info.finish_reason)
        except Unavailable as error:
            self._fall(server, error)
            self._give_up(rows)
        except ConfigError as error:
            for row in rows:
                self._leave(row)
                settle(row, error)
        finally:
            for row in rows:
                self._leave(row)

    def _take(self, row: Row, chunk: Chunk) -> FinishReason | None:
        before = len(row.token_ids)
        try:
            reason = row.extend(chunk)
            self._counts.tokens += len(row.token_ids) - before
            return reason
        except Unavailable:
            for other in self._rows:
                other.distrust()
            raise

    def _leave(self, row: Row) -> None:
        if row in self._rows:
            self._rows.discard(row)
            self._router.ended(self.index, 1)
            self._changes.notify()

    def _give_up(self, rows: Sequence[Row]) -> None:
        """Counts what of each row survives its server."""
        for row in rows:
            if row not in self._rows:
                continue
            self._counts.lost_tokens += row.lost()
            if row.token_ids:
                self._counts.resumed += 1
            else:
                self._counts.reissued += 1

    @staticmethod
    def _explain(row: Row, finish: object) -> None:
        if not row.cancelled and getattr(finish, "type", "") == "abort":
            log.warning("the server aborted request %s: %s", row.request.id, getattr(finish, "message", ""))

    async def cancel(self) -> None:
        """Tells the server which of its rows nobody wants any more."""
        for request in [request_id(row) for row in self._rows if row.cancelled]:
            await self._tell({"rid": request})

    async def _tell(self, whom: dict[str, str | bool]) -> None:
        server = self.server
        if server is None or not self.up:
            return
        try:
            await server.client.post("/abort_request", whom, CALL_S)
        except Unavailable as error:
            self._fall(server, error)

    # ---------------------------------------------------------------------------------------- weights

    @property
    def must_idle(self) -> bool:
        """Whether the server must be empty while weights go in, so that requests have to wait outside."""
        cached = self.server is not None and not self.server.facts.disable_radix_cache
        return self._mode in ("drain", "restart") or (self._mode == "in_flight" and cached)

    async def swap(self, version: Version) -> SwapReport:
        """Takes the staged weights. A server that fails at it is lost, and replaced; that is no error here."""
        server = self.server
        assert server is not None
        # It was silent for want of work; from here on it has some.
        self._heard = started = time.monotonic()
        recomputed = discarded = 0
        try:
            if self.must_idle:
                unfinished = await self.empty(wait_only=self._mode == "drain")
                if self._mode == "drain":
                    started = time.monotonic()
                elif self._mode == "restart":
                    discarded = sum(row.restart() for row in unfinished)
                recomputed = sum(row.length for row in unfinished)
                await server.update(self._staged)
            else:
                for row in self._rows:
                    row.swapping(version)
                recomputed = 0 if self._mode == "keep_kv" else sum(row.length for row in self._rows)
                await self._update_paused(server)
            self.version = version
        except Unavailable as error:
            self._fall(server, error)
        return SwapReport(
            version=version,
            pause_s=time.monotonic() - started,
            recomputed_tokens=recomputed,
            discarded_tokens=discarded,
        )

    async def _update_paused(self, server: Server) -> None:
        """SGLang keeps the requests: `retract` frees their KV cache, so that it is computed anew; `in_place` leaves it.

        Never with flush_cache: SGLang's scheduler dies of it while requests wait.
        """
        mode = "in_place" if self._mode == "keep_kv" else "retract"
        await server.client.post("/pause_generation", {"mode": mode}, CALL_S)
        await server.update(self._staged)
        await server.client.post("/continue_generation", {}, CALL_S)

    async def empty(self, wait_only: bool = False) -> list[Row]:
        """Waits until no row is on the server: to their ends (wait_only), or interrupting them. Returns the unfinished ones.

        A server that does not let go of them is lost, as is one that dies meanwhile; that is no error here.
        """
        running, server, deadline = list(self._rows), self.server, time.monotonic() + self._settings.probe_s
        self._emptying = not wait_only
        try:
            while self._rows and self.up:
                if not wait_only:
                    await self._tell({"abort_all": True})
                try:
                    async with asyncio.timeout(None if wait_only else AGAIN_S):
                        await self._changes.until(lambda: not self._rows or not self.up)
                except TimeoutError:
                    if time.monotonic() > deadline and server is not None:
                        url, count = server.client.url, len(self._rows)
                        self._fall(
                            server, Unavailable(f"{url} did not end {count} aborted requests in {self._settings.probe_s:g} s")
                        )
        finally:
            self._emptying = False
        interrupted = [row for row in running if not row.done]
        self._counts.interrupted += len(interrupted)
        return interrupted
