"""The client of a server that fails in every way: each failure is named as what it is, and nobody waits for ever."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.client import SGLangClient
from asyncrl.generate.sglang.process import free_port
from asyncrl.generate.sglang.segments import RequestRow
from asyncrl.types import GenerationRequest, Sampling

WAIT_S = 10.0


def row(max_tokens: int = 4) -> RequestRow:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens, stop_token_ids=())
    return RequestRow(GenerationRequest(id="7/3", group=7, prompt_ids=(1, 2, 3), sampling=sampling, seed=0), vocabulary=100)


async def generate(client: SGLangClient, max_tokens: int = 4) -> list[Any]:
    return [chunk async for chunk in client.generate([row(max_tokens)], salt=None, stream_interval=16)]


def with_server(
    answering: Any,
    respond: Callable[[web.Request], Awaitable[web.StreamResponse]],
    check: Callable[[SGLangClient], Awaitable[None]],
    key: str = "",
) -> None:
    """Runs `check` with a client, which has `key`, of a server that gives `respond` to everything."""

    async def run() -> None:
        async with answering(respond) as url:
            client = SGLangClient(f"{url}/", key)
            try:
                async with asyncio.timeout(WAIT_S):
                    await check(client)
            finally:
                await client.close()

    asyncio.run(run())


async def never(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (503, "busy", Unavailable, "/generate: status 503: busy"),
        (400, "no such parameter", ConfigError, "status 400: no such parameter; the request can't be served as it is"),
        (200, "[{", Unavailable, "sent what asyncrl can't read"),
        (200, '{"error": "too long"}', ConfigError, "too long"),
    ],
)
def test_a_response_that_makes_no_sense_is_named(
    answering: Any, status: int, body: str, error: type[Exception], words: str
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=body)

    async def check(client: SGLangClient) -> None:
        with pytest.raises(error, match=words):
            await generate(client)

    with_server(answering, respond, check)


def test_a_refused_call_and_one_without_success_are_unavailable(answering: Any) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response({"success": False, "message": "no"}) if request.path == "/a" else web.Response(status=500)

    async def check(client: SGLangClient) -> None:
        with pytest.raises(Unavailable, match=r"/a: status 200: .*no"):
            await client.post("/a", {}, WAIT_S)
        with pytest.raises(Unavailable, match="/b: status 500"):
            await client.check("/b", WAIT_S)

    with_server(answering, respond, check)


def test_a_stream_that_breaks_off_is_unavailable(answering: Any) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"meta_info": {"completion_tokens": 0}}\n\n')
        return response

    async def check(client: SGLangClient) -> None:
        with pytest.raises(Unavailable, match="ended before 1 of its 1 requests had"):
            await generate(client, max_tokens=100)

    with_server(answering, respond, check)


def test_a_deadline_and_a_server_that_is_not_there_are_named(answering: Any) -> None:
    async def check(client: SGLangClient) -> None:
        with pytest.raises(Unavailable, match=r"/health did not respond in 0\.05 s"):
            await client.check("/health", 0.05)
        nobody = SGLangClient(f"http://127.0.0.1:{free_port()}")
        with pytest.raises(Unavailable, match="/health: ClientConnectorError"):
            await nobody.check("/health", WAIT_S)
        await nobody.close()

    with_server(answering, never, check)


def test_whoever_waits_when_the_client_is_closed_gets_unavailable_and_so_do_later_calls(answering: Any) -> None:
    async def check(client: SGLangClient) -> None:
        waiting = [
            asyncio.ensure_future(work) for work in (client.check("/health", WAIT_S), generate(client), generate(client, 99))
        ]
        await asyncio.sleep(0.1)  # until they wait for the server
        assert not any(work.done() for work in waiting)
        await client.close()
        await client.close()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
            assert "its client was closed" in str(outcome)
        with pytest.raises(Unavailable, match="its client was closed"):
            await client.check("/health", WAIT_S)

    with_server(answering, never, check)
