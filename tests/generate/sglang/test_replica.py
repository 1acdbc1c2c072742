"""The `sglang` engine over servers played in this process: where rows go, and what an update or a death does to them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from asyncrl.config import EngineSpec, LimitsSpec
from asyncrl.errors import Closed, Unavailable
from asyncrl.generate.sglang.client import request_id
from asyncrl.generate.sglang.engine import SGLangEngine
from asyncrl.generate.sglang.replica import MAX_LOSSES
from asyncrl.generate.sglang.segments import RequestRow
from asyncrl.generate.sglang.wire import Chunk, Facts, Finish, Labelled, Meta, ServerLoad
from asyncrl.types import Generation, GenerationRequest, Sampling, Span, SwapReport, Tokens, Version

pytestmark = pytest.mark.slow

WAIT_S = 10.0
TOKEN_S = 0.002  # per token
V1, V2 = Version(1, 1), Version(1, 2)


class FakeServer:
    """Decodes a token per row and TOKEN_S, labelled with the weights that it has; it is also its own client."""

    url = "http://fake"

    def __init__(self, prefix_cache: bool = False, starts: bool = True, hangs: bool = False) -> None:
        self.client, self.facts = self, Facts(disable_radix_cache=not prefix_cache)
        self.version = Version(0, 0)
        self.dead, self.paused = not starts, False
        self.running: set[str] = set()
        self.aborted: set[str] = set()
        self.paths: list[str] = []
        self.beats = 0
        self.hangs = hangs  # when it is next given weights, for ever
        self.may_take_weights = asyncio.Event()  # a test may have an update wait for it
        self.may_take_weights.set()
        self.updating = False
        self.looks = 0  # at whether it is alive

    async def open(self, deadline_s: float) -> None:
        self._living()

    def require(self, mode: str) -> None: ...

    def check_alive(self) -> None:
        self.looks += 1
        self._living()

    def _living(self) -> None:
        if self.dead:
            raise Unavailable("the fake server died")

    async def load(self) -> ServerLoad:
        self.check_answers()
        return ServerLoad(num_waiting_reqs=3, token_usage=0.5)

    async def probe(self, deadline_s: float) -> None:
        self.check_answers()
        self.paths.append("a probe")

    def check_answers(self) -> None:
        if self.updating or self.paused:
            raise Unavailable("the fake server takes weights, and answers nothing else")

    async def update(self, staged: Any, deadline_s: float) -> None:
        self._living()
        assert self.paused or not self.running  # never while it computes
        self.updating = True
        try:
            async with asyncio.timeout(deadline_s):
                await (asyncio.Event() if self.hangs else self.may_take_weights).wait()
        except TimeoutError:
            raise Unavailable(f"the fake server did not take weights in {deadline_s} s") from None
        self.updating, self.version = False, staged.version

    def pids(self) -> list[int]:
        return []

    async def close(self) -> None:
        self.dead = True

    async def post(self, path: str, body: dict[str, Any], deadline_s: float) -> None:
        self._living()
        self.paths.append(path)
        if path == "/abort_request":
            self.aborted |= self.running if "abort_all" in body else {body["rid"]}
        else:
            self.paused = path == "/pause_generation"

    async def generate(self, rows: Sequence[RequestRow], *, salt: str | None, stream_interval: int) -> AsyncIterator[Chunk]:
        assert salt == (None if self.facts.disable_radix_cache else str(self.version))
        left = {i: row.request.sampling.max_tokens - len(row.token_ids) for i, row in enumerate(rows)}
        made: dict[int, list[Version]] = {i: [] for i in left}
        self.running |= {request_id(row) for row in rows}
        while left:
            await asyncio.sleep(TOKEN_S)
            self._living()
            for i in [] if self.paused else list(left):
                aborted = request_id(rows[i]) in self.aborted
                if not aborted:
                    made[i].append(self.version)
                finish = Finish("abort") if aborted else Finish("length") if len(made[i]) == left[i] else None
                if finish is not None:
                    del left[i]
                    self.running.discard(request_id(rows[i]))
                yield self._chunk(i, made[i], finish, new=not aborted)

    @staticmethod
    def _chunk(index: int, made: list[Version], finish: Finish | None, new: bool) -> Chunk:
        labels = [Labelled(str(version), at, at + 1) for at, version in enumerate(made)]
        meta = Meta(
            completion_tokens=len(made),
            finish_reason=finish,
            output_token_logprobs=[(-1.0, 7, None)] * new,
            weight_versions=labels if finish else None,
        )
        return Chunk(meta_info=meta, output_ids=[7] * new, index=index)


class Farm:
    """Every server that the engine has made, place by place, the newest last."""

    def __init__(self, places: int, **how: Any) -> None:
        self.made: list[list[FakeServer]] = [[] for _ in range(places)]
        self.how = how

    def makers(self) -> list[Callable[[], Any]]:
        def make(place: list[FakeServer]) -> FakeServer:
            place.append(FakeServer(**self.how))
            return place[-1]

        return [lambda place=place: make(place) for place in self.made]  # type: ignore[misc]

    def __getitem__(self, place: int) -> FakeServer:
        return self.made[place][-1]


Open = Callable[..., tuple[SGLangEngine, Farm]]


@pytest.fixture
def open_engine() -> Iterator[Open]:
    """open_engine(places, mode, **FakeServer): an engine that is started and has weights V1, and its servers."""
    engines: list[SGLangEngine] = []

    def open_it(
        places: int = 1, mode: Any = "in_flight", probe_s: float = WAIT_S, update_s: float = WAIT_S, **how: Any
    ) -> tuple[SGLangEngine, Farm]:
        farm = Farm(places, **how)
        spec = EngineSpec(kind="sglang", slots=16, update_mode=mode, stream_interval=1)
        limits = LimitsSpec(health_timeout_s=2 * probe_s, update_timeout_s=update_s)
        engine = SGLangEngine(farm.makers(), spec, limits, max_length=2000, vocabulary=100)
        engines.append(engine)
        engine.start()
        swap(engine, V1)
        until(lambda: engine.gauges()["servers_up"] == places)
        return engine, farm

    yield open_it
    for engine in engines:
        engine.close()


SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=60, stop_token_ids=())


def swap(engine: SGLangEngine, version: Version) -> SwapReport:
    return engine.update_weights(version, {"w": torch.full((2,), float(version.update))})


def ask(engine: SGLangEngine, group: int = 0, each: int = 4, tokens: int = 60) -> "list[Future[Generation]]":
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=tokens, stop_token_ids=())
    requests = [
        GenerationRequest(id=f"{group}/{i}", group=group, prompt_ids=(1, 2), sampling=sampling, seed=0) for i in range(each)
    ]
    return engine.submit_group(requests)


def until(condition: Callable[[], bool]) -> None:
    end, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < end, "it never came true"
        pause.wait(0.002)


def results(futures: "list[Future[Generation]]") -> list[Generation]:
    return [future.result(WAIT_S) for future in futures]


def decoded(engine: SGLangEngine, tokens: int) -> None:
    """Waits until servers have reported so many tokens more."""
    before = engine.gauges()["tokens"]
    until(lambda: engine.gauges()["tokens"] >= before + tokens)


def test_groups_go_to_the_least_loaded_server_and_all_rollouts_end(open_engine: Open) -> None:
    engine, farm = open_engine(places=2)
    assert engine.slots == 32
    futures = [future for group in range(4) for future in ask(engine, group)]
    until(lambda: len(farm[0].running) == len(farm[1].running) == 8)
    assert all(answer.spans == (Span(V1, 60),) for answer in results(futures))
    until(lambda: engine.gauges()["waiting"] == 6)
    gauges = engine.gauges()
    assert (gauges["servers_up"], gauges["in_flight"], gauges["kv_usage"], gauges["restarts"]) == (2, 0, 0.5, 0)


def test_rows_of_a_server_that_dies_go_on_elsewhere_with_their_tokens_while_it_is_replaced(open_engine: Open) -> None:
    engine, farm = open_engine(places=2)
    futures = ask(engine, 0, tokens=300) + ask(engine, 1, tokens=300)
    decoded(engine, 80)
    farm[0].dead = True
    until(lambda: len(farm[1].running) == 8)
    answers = results(futures)
    assert all(answer.spans == (Span(V1, 300),) and answer.token_ids == [7] * 300 for answer in answers)
    until(lambda: engine.gauges()["servers_up"] == 2)
    gauges = engine.gauges()
    assert (gauges["restarts"], gauges["resumed"], gauges["reissued"], gauges["lost_tokens"]) == (1, 4, 0, 0)
    assert len(farm.made[0]) == 2
    assert farm[0].version == V1  # it got the weights before it served


def test_another_engine_goes_on_with_what_was_told_whatever_was_swapped(open_engine: Open) -> None:
    """Rows that are told of leave their server for a swap: the version of each token is known at once."""
    engine, farm = open_engine()
    told: dict[str, list[Tokens]] = {}
    request = GenerationRequest(id="0/0", group=0, prompt_ids=(1, 2), sampling=replace(SAMPLING, max_tokens=400), seed=0)

    def hear(request: GenerationRequest, start: int, tokens: Tokens) -> None:
        pieces = told.setdefault(request.id, [])
        assert start == sum(len(piece.token_ids) for piece in pieces)
        pieces.append(tokens)

    (future,) = engine.submit_group([request], hear)
    decoded(engine, 40)
    swap(engine, V2)
    decoded(engine, 40)
    engine.abort()
    whole = future.result(WAIT_S)
    spans = [span for piece in told["0/0"] for span in piece.spans]
    assert {span.version for span in spans} == {V1, V2}
    assert farm[0].paths.count("/pause_generation") == 1  # of the first swap, when there was nothing
    count = sum(span.length for span in spans)
    assert len(whole.token_ids) - count <= 1
    other, _ = open_engine()
    swap(other, V2)
    (answer,) = results(other.submit_group([replace(request, begun=whole)], hear))
    assert (len(answer.token_ids), answer.finish_reason) == (400, "length")
    assert answer.spans == (whole.spans[0], Span(V2, 400 - whole.spans[0].length))


def test_nobody_is_told_any_more_of_a_row_that_lost_what_was_told(open_engine: Open) -> None:
    engine, farm = open_engine()
    starts: list[int] = []
    request = GenerationRequest(id="0/0", group=0, prompt_ids=(1, 2), sampling=replace(SAMPLING, max_tokens=300), seed=0)
    (future,) = engine.submit_group([request], lambda request, start, tokens: starts.append(start))
    decoded(engine, 40)
    (row,) = engine._rows
    engine._loop.call(row.distrust)
    farm[0].dead = True
    assert future.result(WAIT_S).spans == (Span(V1, 300),)
    assert starts == sorted(set(starts))
    assert 40 <= len(starts) < 300


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_an_update_in_flight_retracts_or_interrupts_and_rows_go_on(open_engine: Open, prefix_cache: bool) -> None:
    engine, farm = open_engine(prefix_cache=prefix_cache)
    futures = ask(engine, tokens=300)
    decoded(engine, 80)
    report = swap(engine, V2)
    assert (report.version, report.discarded_tokens) == (V2, 0)
    assert report.recomputed_tokens >= 4 * 2 + 80
    for answer in results(futures):
        assert [span.version for span in answer.spans] == [V1, V2]
        assert len(answer.token_ids) == 300
    assert ("/pause_generation" in farm[0].paths) == (not prefix_cache)
    assert engine.gauges()["interrupted"] == (4 if prefix_cache else 0)


def test_drain_waits_for_running_rows_and_restart_regenerates_them(open_engine: Open) -> None:
    for mode, spans in (("drain", (Span(V1, 100),)), ("restart", (Span(V2, 100),))):
        engine, _ = open_engine(mode=mode)
        futures = ask(engine, tokens=100)
        decoded(engine, 40)
        report = swap(engine, V2)
        assert (report.discarded_tokens > 0) == (mode == "restart")
        assert [future.done() for future in futures] == [mode == "drain"] * 4
        assert {answer.spans for answer in results(futures)} == {spans}


def test_an_abort_ends_a_group_and_no_other(open_engine: Open) -> None:
    engine, _ = open_engine()
    doomed, kept = ask(engine, 1, tokens=1500), ask(engine, 2, tokens=100)
    decoded(engine, 40)
    engine.abort(1)
    for answer in results(doomed):
        assert answer.finish_reason == "abort"
        assert 0 < len(answer.token_ids) < 1500
    assert {answer.finish_reason for answer in results(kept)} == {"length"}


def test_a_cancelled_request_leaves_its_server(open_engine: Open) -> None:
    engine, farm = open_engine()
    doomed, kept = ask(engine, 1, tokens=1500), ask(engine, 2, tokens=100)
    decoded(engine, 40)
    for future in doomed:
        future.cancel()
    assert {answer.finish_reason for answer in results(kept)} == {"length"}
    until(lambda: len(farm[0].aborted) == len(doomed) and not farm[0].running)
    assert engine.gauges()["in_flight"] == 0.0


def test_pause_interrupts_and_resume_goes_on(open_engine: Open) -> None:
    engine, farm = open_engine()
    futures = ask(engine, tokens=100)
    decoded(engine, 40)
    engine.pause()
    assert farm[0].running == set()
    assert not any(future.done() for future in futures)
    engine.resume()
    assert {answer.spans for answer in results(futures)} == {(Span(V1, 100),)}


def test_a_server_that_keeps_aborted_rows_is_replaced(open_engine: Open) -> None:
    engine, farm = open_engine(probe_s=0.3, prefix_cache=True)
    futures = ask(engine, tokens=200)
    decoded(engine, 40)
    farm[0].paused = True  # wedged: an abort changes nothing
    swap(engine, V2)
    assert {answer.spans[-1].version for answer in results(futures)} == {V2}
    assert engine.gauges()["restarts"] == 1


@pytest.mark.parametrize(
    ("mode", "prefix_cache"), [("in_flight", False), ("in_flight", True), ("keep_kv", False), ("restart", False)]
)
def test_a_server_that_takes_weights_for_long_is_left_alone(open_engine: Open, mode: str, prefix_cache: bool) -> None:
    """Long: health_timeout_s has passed many times, and whatever asks a server meanwhile has looked at it."""
    probe_s = 0.02
    engine, farm = open_engine(mode=mode, probe_s=probe_s, prefix_cache=prefix_cache)
    until(lambda: "a probe" in farm[0].paths)  # idle, it is probed all the time
    futures = ask(engine, tokens=300)
    decoded(engine, 40)
    server = farm[0]
    server.may_take_weights.clear()
    swapped: list[SwapReport] = []
    updating = threading.Thread(target=lambda: swapped.append(swap(engine, V2)))
    updating.start()
    until(lambda: server.updating)
    looks = server.looks
    until(lambda: server.looks >= looks + 3)  # of the watch, which finds its processes alive
    engine._loop.call(server.may_take_weights.set)
    updating.join(WAIT_S)
    assert swapped[0].version == V2
    assert swapped[0].pause_s > 3 * probe_s
    assert {answer.spans[-1].version for answer in results(futures)} == {V2}
    assert engine.gauges()["restarts"] == 0


def test_a_server_that_hangs_in_an_update_is_replaced_after_a_limit_and_so_is_the_next_one(open_engine: Open) -> None:
    engine, farm = open_engine(update_s=0.2)
    futures = ask(engine, tokens=300)
    decoded(engine, 40)
    farm[0].hangs = True
    farm.how = {"hangs": True}  # the next one hangs over its first weights
    threading.Thread(target=swap, args=(engine, V2)).start()
    until(lambda: len(farm.made[0]) == 2)
    farm.how = {}
    assert {answer.spans[-1].version for answer in results(futures)} == {V2}
    assert len(farm.made[0]) == 3
    assert engine.gauges()["restarts"] == 2


def test_nothing_is_taken_from_a_server_that_somebody_else_updates(open_engine: Open) -> None:
    engine, farm = open_engine()
    futures = ask(engine, 0, tokens=60) + ask(engine, 1, tokens=200)
    decoded(engine, 40)
    farm[0].version = Version(9, 2)
    for answer in results(futures):
        assert {span.version for span in answer.spans} == {V1}
        assert sum(span.length for span in answer.spans) == len(answer.token_ids)
    gauges = engine.gauges()
    assert (gauges["restarts"], gauges["resumed"], gauges["reissued"]) == (1, 0, 8)
    assert len(farm.made[0]) == 2


def test_deaths_in_a_row_end_the_engine_and_a_finished_rollout_forgives_them(open_engine: Open) -> None:
    engine, farm = open_engine()
    for count in range(1, MAX_LOSSES + 1):
        farm[0].dead = True
        until(lambda count=count: engine.gauges()["restarts"] == count and engine.gauges()["servers_up"] == 1)
    results(ask(engine, tokens=5))
    farm[0].dead = True
    until(lambda: engine.gauges()["restarts"] == MAX_LOSSES + 1)
    farm.how = {"starts": False}
    futures = ask(engine, tokens=1000)
    farm[0].dead = True
    with pytest.raises(Unavailable, match="the fake server died"):
        results(futures)
    with pytest.raises(Unavailable, match="the fake server died"):
        engine.health(WAIT_S)


def test_close_ends_unfinished_rows(open_engine: Open) -> None:
    engine, _ = open_engine()
    futures = ask(engine, tokens=1500)
    decoded(engine, 10)
    engine.close()
    with pytest.raises(Closed):
        results(futures)
    with pytest.raises(Closed):
        results(ask(engine))


def test_tokens_of_unfinished_rows_and_beats_of_servers_are_progress(open_engine: Open) -> None:
    engine, farm = open_engine(places=2)
    before = engine.progress()
    farm[0].beats += 2  # it starts, or takes weights
    farm[1].beats += 1
    assert engine.progress() == before + 3
    futures = ask(engine, tokens=1000)
    until(lambda: engine.progress() >= before + 3 + 40)
    assert not any(future.done() for future in futures)
    engine.abort()
    results(futures)
