"""The `sglang` engine: requests to one or several SGLang servers, which it starts, updates, watches and replaces.

    submit_group ─► segment on a replica ─► rows end ─► futures
                      ▲            │ interrupted by a swap, or its server died
                      └────────────┘ they go on, there or elsewhere, with the tokens so far as prefix

Everything below `submit_group` runs in one asyncio loop, in one thread. The replicas' lives are in replica.py.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from functools import partial

from asyncrl.config import EngineSpec, LimitsSpec
from asyncrl.errors import AsyncRLError, Closed, Unavailable
from asyncrl.generate.requests import check_request, settle
from asyncrl.generate.sglang.client import check_top_k
from asyncrl.generate.sglang.keys import RunningServer
from asyncrl.generate.sglang.replica import Replica, ServerCounters
from asyncrl.generate.sglang.segments import RequestRow
from asyncrl.generate.sglang.server import SGLangServer
from asyncrl.generate.sglang.transfer import StagedWeights
from asyncrl.interfaces import Tensors, Told
from asyncrl.loops import LoopThread
from asyncrl.types import Generation, GenerationRequest, SwapReport, Version

CLOSE_S = 30.0


class SGLangEngine:
    """An `Engine` (asyncrl.interfaces) over SGLang servers. Thread-safe. Nothing is decoded before the first weights.

    servers: each makes one server, and another one after every death. vocabulary: of the model, tokens.
    """

    def __init__(
        self,
        servers: Sequence[Callable[[], SGLangServer]],
        spec: EngineSpec,
        limits: LimitsSpec,
        *,
        max_length: int,
        vocabulary: int,
    ) -> None:
        self.max_length, self.hands_over = max_length, spec.hands_over
        self._slots_each, self._stream_interval, self._vocabulary = spec.slots, spec.stream_interval, vocabulary
        self._staged = StagedWeights()
        self._loop = LoopThread("the sglang engine", self._drop)
        self._changes = self._loop.changes
        self._counters = ServerCounters()
        self._replicas = [
            Replica(make, spec, limits, staged=self._staged, changes=self._changes, counters=self._counters) for make in servers
        ]
        self.version: Version | None = None  # of the weights now in use
        self._paused = self._swapping = False
        self._rows: set[RequestRow] = set()  # unfinished
        self._updating = asyncio.Lock()  # one update of weights at a time, a restarted server's included

    @property
    def slots(self) -> int:
        """Requests that the servers take now; while none is up, those that all of them would take."""
        return self._slots_each * (len(self._up()) or len(self._replicas))

    def _up(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.up]

    # ---------------------------------------------------------------------------------------- requests

    def submit_group(self, requests: Sequence[GenerationRequest], told: Told | None = None) -> "list[Future[Generation]]":
        """Queues requests together: they go to one server as one batch. Returns futures in the same order.

        The future of one raises ConfigError if it can't fit, Closed after `close`, Unavailable on failure. One that is
        cancelled gives its slot back soon.
        """
        long = [request.sampling.max_tokens > self._stream_interval for request in requests]
        rows = [RequestRow(r, self._vocabulary, told if is_long else None) for r, is_long in zip(requests, long, strict=True)]
        for row in rows:
            row.future.add_done_callback(partial(self._note_cancelled, row))
        sound = []
        for row in rows:
            refusal = check_request(row.request, max_length=self.max_length, vocabulary=self._vocabulary)
            refusal = refusal or check_top_k(row.request)
            if refusal is not None:
                row.future.set_exception(refusal)
            else:
                sound.append(row)
        if sound and (ended := self._loop.call(self._accept, sound)) is not None:
            for row in sound:
                row.future.set_exception(ended)
        return [row.future for row in rows]

    def _note_cancelled(self, row: RequestRow, future: "Future[Generation]") -> None:
        """Called by whoever ends a future."""
        if future.cancelled():
            self._loop.call(self._cancel, row)

    def abort(self, group: int | None = None) -> None:
        """Ends a group's unfinished requests, or all, with finish_reason `abort` and the tokens reported so far, soon."""
        with contextlib.suppress(Closed):
            self._loop.ask(self._abort(group)).result()

    # ------------------------------------------------------------------------------------------ serving

    def _accept(self, rows: list[RequestRow]) -> None:
        self._rows.update(rows)
        self._loop.spawn(self._serve(rows))

    async def _serve(self, rows: Sequence[RequestRow]) -> None:
        """Until every row has ended: finds a replica for those that have not, and has it take them further."""
        while rows := [row for row in rows if not row.done]:
            cancelled = [row for row in rows if row.cancelled]
            replica = self._next_replica(rows[0].request)
            if cancelled:
                for row in cancelled:
                    self._settle(row, row.generation("abort"))
            elif replica is None:
                await self._changes.next()
            else:
                await replica.segment(rows, self._settle)

    def _next_replica(self, request: GenerationRequest) -> Replica | None:
        """The replica that takes rows like this: the least loaded one (of equals, the first); of episodes the same one for all
        turns of a group. None while no server is up, there are no weights, or something waits for the servers to be idle."""
        up = self._up()
        if not up or self.version is None or self._paused or self._swapping:
            return None
        return up[request.group % len(up)] if request.goes_on else min(up, key=lambda replica: len(replica.rows))

    def _settle(self, row: RequestRow, outcome: Generation | AsyncRLError) -> None:
        self._rows.discard(row)
        settle(row.future, outcome)
        self._changes.notify()

    async def _abort(self, group: int | None) -> None:
        for row in self._rows:
            row.cancelled = row.cancelled or group in (None, row.request.group)
        self._changes.notify()
        for replica in self._replicas:
            await replica.cancel(replica.rows)

    def _cancel(self, row: RequestRow) -> None:
        row.cancelled = True
        self._settle(row, row.generation("abort"))
        for replica in self._replicas:
            self._loop.spawn(replica.cancel([row]))

    # ------------------------------------------------------------------------------------------ weights

    def update_weights(self, version: Version, tensors: Tensors) -> SwapReport:
        """Swaps all servers at once, at a step boundary of each. Waits first until one is up. One that dies meanwhile is
        replaced, and gets these weights before it serves. Raises why the engine ended, if it does."""
        return self._loop.ask(self._update(version, tensors)).result()

    async def _update(self, version: Version, tensors: Tensors) -> SwapReport:
        async with self._updating:
            await asyncio.to_thread(self._staged.put, version, tensors)
        # A replica that comes up meanwhile takes the staged ones.
        await self._changes.until(lambda: self._up())
        async with self._updating:
            stale = [replica for replica in self._up() if replica.version != version]
            try:
                self._swapping = True  # requests wait here meanwhile: a server's queue could not tell their version
                reports = await asyncio.gather(*(replica.swap(version) for replica in stale))
                self.version = version
            finally:
                self._swapping = False
                self._changes.notify()
        return SwapReport(
            version=version,
            pause_s=max((report.pause_s for report in reports), default=0.0),
            recomputed_tokens=sum(report.recomputed_tokens for report in reports),
            discarded_tokens=sum(report.discarded_tokens for report in reports),
        )

    # ----------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Starts the servers; returns at once. `close` ends them."""
        for replica in self._replicas:
            self._loop.call(self._loop.spawn, replica.keep(self._updating))
        self._loop.start()

    def _drop(self, reason: AsyncRLError) -> None:
        """The engine is over: every unfinished future names the reason."""
        for row in list(self._rows):
            self._settle(row, reason)

    def pause(self) -> None:
        """Interrupts what runs and keeps it for `resume`."""
        self._loop.ask(self._pause()).result()

    async def _pause(self) -> None:
        self._paused = True
        await asyncio.gather(*(replica.interrupt() for replica in self._replicas))

    def resume(self) -> None:
        self._loop.ask(self._resume()).result()

    async def _resume(self) -> None:
        self._paused = False
        self._changes.notify()

    def health(self, deadline_s: float) -> None:
        """Raises why the engine ended, or Unavailable if its loop doesn't turn. Each server is probed by its replica, all the
        time, and replaced if it hangs; only one that can't be brought back ends the engine."""
        try:
            self._loop.ask(asyncio.sleep(0)).result(deadline_s)
        except NotInTime:
            raise Unavailable(f"the sglang engine's thread did not respond in {deadline_s} s; restart it") from None

    def gauges(self) -> dict[str, float]:
        """Counters since the start, and where every server stands now."""
        up = self._up()
        return {
            **self._counters.gauges(),
            "servers_up": float(len(up)),
            "slots": float(self.slots),
            "in_flight": float(len(self._rows)),
            "waiting": float(sum(replica.load.num_waiting_reqs for replica in up)),
            "kv_usage": max((replica.load.token_usage for replica in up), default=0.0),
        }

    def progress(self) -> int:
        """Tokens reported by servers, and the beats of those that it has now."""
        return self._counters.tokens + sum(one.server.beats for one in self._replicas if one.server is not None)

    def servers(self) -> list[RunningServer]:
        """Where its servers listen now, and their keys."""
        return [replica.server.at for replica in self._replicas if replica.server is not None]

    def pids(self) -> list[int]:
        """Every process of the servers that it started."""
        return [pid for replica in self._replicas if replica.server is not None for pid in replica.server.pids()]

    def close(self, deadline_s: float = CLOSE_S) -> None:
        """Ends the servers that it started; unfinished futures raise Closed."""
        self._loop.close(Closed("the engine was closed"), self._close, deadline_s)
        self._staged.close()

    async def _close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self._replicas))
