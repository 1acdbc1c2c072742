"""What clients do wrong, over real sockets: each gets its answer, and the engine, the session and the log stay in order."""

import asyncio
import json
import logging
import re
import resource
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="needs aiohttp (pip install 'asyncrl[agents]')")

HELLO = [{"role": "user", "content": "hello"}]
BODY = {"messages": HELLO}
RETRY = {"x-stainless-retry-count": "1"}
WAIT_S = 20.0


async def post(url: str, body: Any, headers: dict[str, str]) -> tuple[int, Any]:
    how = {"json": body} if isinstance(body, dict) else {"data": body}
    async with aiohttp.ClientSession() as client, client.post(url, headers=headers, **how) as response:
        return response.status, await response.json()


def arrived(engine: Any) -> Any:
    return asyncio.to_thread(engine.arrived.acquire, timeout=WAIT_S)


def test_a_client_that_is_gone_gives_its_slot_back(serve, engine) -> None:
    engine.held, counts = [], Counter()

    async def talk() -> Any:
        async with serve(return_s=0.0, counts=counts) as served:
            url = served.base_url + "/chat/completions"
            call = asyncio.create_task(post(url, BODY, served.headers))
            assert await arrived(engine)
            call.cancel()
            assert await asyncio.to_thread(engine.cancelled.acquire, timeout=WAIT_S)
            engine.held = None
            status, told = await post(url, BODY, {**served.headers, **RETRY})  # its own was given up: it is another call
            assert (status, told["choices"][0]["message"]["content"]) == (200, "look")
            return served.trajectory()

    made = asyncio.run(talk())
    assert (len(engine.requests), made.token_ids, made.turns, counts) == (2, [6, 1], (0,), {"calls_given_up": 1})


def test_a_client_that_comes_back_in_time_joins_its_call(serve, engine) -> None:
    engine.held = []

    async def talk() -> None:
        async with serve() as served:
            url = served.base_url + "/chat/completions"
            call = asyncio.create_task(post(url, BODY, served.headers))
            assert await arrived(engine)
            call.cancel()
            again = [asyncio.create_task(post(url, BODY, {**served.headers, **RETRY})) for _ in range(2)]
            await asyncio.wait(again, timeout=0.2)  # they wait for it as well
            ((request, future),) = engine.held
            future.set_result(engine.answer(request))
            told = [await one for one in again] + [await post(url, BODY, {**served.headers, **RETRY})]
            assert {(status, answer["choices"][0]["message"]["content"]) for status, answer in told} == {(200, "look")}
            assert served.trajectory().token_ids == [6, 1]

    asyncio.run(talk())
    assert len(engine.requests) == 1


@pytest.mark.slow
def test_the_sdk_comes_back_after_its_timeout(serve, engine) -> None:
    openai = pytest.importorskip("openai", reason="needs openai (pip install 'asyncrl[test]')")
    engine.held = []

    async def talk() -> None:
        async with serve() as served, openai.AsyncOpenAI(base_url=served.base_url, api_key=served.key) as client:
            patient = client.with_options(timeout=0.3, max_retries=20)
            asked = asyncio.create_task(patient.chat.completions.create(model="policy", messages=HELLO))
            assert await arrived(engine)
            ((call,),) = served.gateway._open[served.key].calls.values()
            for waiting in (0, 1):  # it is gone, and back
                while call.waiting != waiting:
                    await asyncio.sleep(0.01)
            ((request, future),) = engine.held
            future.set_result(engine.answer(request))
            assert (await asked).choices[0].message.content == "look"

    asyncio.run(talk())
    assert len(engine.requests) == 1


def test_the_same_question_again_is_another_call(serve, engine) -> None:
    async def talk() -> None:
        async with serve() as served:
            for _ in range(2):
                assert (await post(served.base_url + "/chat/completions", BODY, served.headers))[0] == 200

    asyncio.run(talk())
    assert len({request.seed for request in engine.requests}) == 2


def test_an_episodes_end_ends_its_calls_and_its_key(serve, engine) -> None:
    engine.held = []

    async def talk() -> None:
        async with serve() as served:
            url = served.base_url + "/chat/completions"
            call = asyncio.create_task(post(url, BODY, served.headers))
            assert await arrived(engine)
            served.gateway.close(served.key)
            assert await asyncio.to_thread(engine.cancelled.acquire, timeout=WAIT_S)
            for status, told in (await call, await post(url, BODY, served.headers)):
                assert (status, told["error"]["code"]) == (410, "episode_ended")

    asyncio.run(talk())


@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/messages", "/messages/count_tokens"])
def test_keys(serve, path: str, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    body = {**BODY, "input": "hello", "max_tokens": 5}
    keys = []

    async def talk() -> None:
        async with serve() as served:
            keys.append(served.key)
            for headers, status in (({}, 401), ({"Authorization": "Bearer x"}, 401), ({"x-api-key": served.key}, 200)):
                assert (await post(served.base_url + path, body, headers))[0] == status
            in_url = served.base_url.replace("/v1", f"/sessions/{served.key}/v1")
            assert (await post(in_url + path, body, {}))[0] == 200
            assert (await post(in_url + path, b"{", {}))[0] == 400
            assert (await post(in_url + "/nothing", body, {}))[0] == 404

    asyncio.run(talk())
    assert keys[0] not in caplog.text


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_100_mb_is_not_read(serve, announced: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(1 << 20)

    async def talk() -> None:
        async with serve() as served:
            size = {"Content-Length": str(100 << 20)} if announced else {}
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            status, told = await post(served.base_url + "/chat/completions", pieces(), {**served.headers, **size})
            assert (status, told["error"]["code"]) == (413, "request_too_large")
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (8 if announced else 80) << 10  # KiB
            status, told = await post(served.base_url + "/messages", pieces(), {**served.headers, **size})
            assert (status, told["error"]["type"]) == (413, "request_too_large")

    asyncio.run(talk())


TOOL = {"type": "function", "function": {"name": "look"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": "{"}}]}
UNREADABLE = [
    ("/chat/completions", b"{", "truncated"),
    ("/chat/completions", b"[]", "Expected `object`"),
    ("/chat/completions", b'{"messages":' + b"[" * 100_000, "ecursion"),
    ("/chat/completions", b"\xff", "malformed|UTF-8"),
    ("/chat/completions", {}, "no messages"),
    ("/chat/completions", {"messages": "x"}, r"Expected `array`.*\$\.messages"),
    ("/chat/completions", {"messages": ["x"]}, r"Expected `object`.*\$\.messages\[0\]"),
    ("/chat/completions", {"messages": [{"content": "x"}]}, "'role'"),
    ("/chat/completions", {"messages": [{**HELLO[0], "tool_call_id": []}]}, "unhashable"),
    ("/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "text alone"),
    ("/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' is not taken"),
    ("/chat/completions", {"messages": [CALLED, {"role": "user", "content": "x"}]}, "can't show these messages"),
    ("/chat/completions", {"messages": HELLO, "tools": [{"type": "web"}]}, "'web'|'function'"),
    ("/chat/completions", {"messages": HELLO, "tools": [{**TOOL, "function": {}}]}, "'name'"),
    ("/chat/completions", {"messages": HELLO, "tools": {}}, r"Expected `array.*\$\.tools"),
    ("/chat/completions", {"messages": HELLO, "max_tokens": -1}, r">= 1 - at `\$\.max_tokens"),
    ("/chat/completions", {"messages": HELLO, "n": 0}, r">= 1 - at `\$\.n"),
    ("/responses", {"input": []}, "no messages"),
    ("/responses", {"input": [{"type": "function_call"}]}, "'call_id'"),
    ("/responses", {"input": ["x"]}, r"Expected `object`.*\$\.input\[0\]"),
    ("/responses", {"input": "x", "tools": [{}]}, "'name'"),
    ("/messages", {"messages": HELLO, "tools": [{"type": "web_search", "name": "look"}]}, "type 'web_search'"),
    ("/messages", {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "'tool_use_id'"),
    ("/messages", {"messages": [{"role": "user", "content": [{}]}]}, "'type'"),
]


def test_what_cant_be_read(serve, engine) -> None:
    async def talk() -> None:
        async with serve(max_turns=100) as served:
            for path, body, words in UNREADABLE:
                status, told = await post(served.base_url + path, body, served.headers)
                assert status == 400, (path, body)
                assert re.search(words, told["error"]["message"]), (path, body, told)
            assert (await post(served.base_url + "/chat/completions", BODY, served.headers))[0] == 200

    asyncio.run(talk())
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/v1/chat/completions"), ("GET", "/")])
def test_a_path_that_is_not_there(serve, method: str, path: str) -> None:
    async def talk() -> None:
        async with serve() as served, aiohttp.ClientSession() as client:
            response = await client.request(method, served.base_url.removesuffix("/v1") + path)
            text = (await response.json())["error"]["message"]
            assert (response.status, response.headers["x-should-retry"]) == (404, "false")
            assert text.startswith(f"{method} {path} is not served; there are POST /v1/chat/completions, ")

    asyncio.run(talk())


def test_beyond_the_budget(serve, engine) -> None:
    from asyncrl.episodes.session import Budget

    async def talk() -> None:
        async with serve(budget=Budget(tokens=1000, turn_tokens=4, context=9), max_turns=3) as served:
            long = [{"role": "user", "content": "hello " * 9}]
            for path, body in (("/chat/completions", {"messages": long}), ("/responses", {"input": long})):
                status, told = await post(served.base_url + path, body, served.headers)
                assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
            status, told = await post(served.base_url + "/messages", {"messages": long, "max_tokens": 5}, served.headers)
            assert (status, told["error"]["message"][:18]) == (400, "prompt is too long")
            calls = [await post(served.base_url + "/chat/completions", BODY, served.headers) for _ in range(4)]
            assert [status for status, _ in calls] == [200, 200, 200, 400]  # what was refused was no turn
            assert calls[-1][1]["error"]["code"] == "rate_limit_exceeded"

    asyncio.run(talk())
    assert len(engine.requests) == 3


def test_calls_side_by_side(serve, engine) -> None:
    """Each is recorded once, in its own context, with tool calls of its own name."""
    engine.held, engine.answers, count = [], [14, 1], 40

    async def talk() -> Any:
        async with serve(max_turns=200) as served:
            questions = [{"messages": [{"role": "user", "content": "hello " * (1 + i // 2)}]} for i in range(count)]
            calls = [asyncio.create_task(post(served.base_url + "/chat/completions", q, served.headers)) for q in questions]
            for _ in calls:
                assert await arrived(engine)
            for request, future in engine.held:
                future.set_result(engine.answer(request))
            told = [await call for call in calls]
            assert {status for status, _ in told} == {200}
            assert len({answer["choices"][0]["message"]["tool_calls"][0]["id"] for _, answer in told}) == count
            return served.trajectory()

    made = asyncio.run(talk())
    assert (len(made.turns), sum(made.loss_mask), len(made.segments)) == (count, 2 * count, count)
    assert len({request.seed for request in engine.requests}) == len({request.id for request in engine.requests}) == count


def test_the_end_of_an_episode_gives_up_equal_calls_too(serve, engine) -> None:
    engine.held = []

    async def talk() -> None:
        async with serve() as served:
            url = served.base_url + "/chat/completions"
            calls = [asyncio.create_task(post(url, BODY, served.headers)) for _ in range(2)]
            for _ in calls:
                assert await arrived(engine)
            served.gateway.close(served.key)
            assert [(await call)[0] for call in calls] == [410, 410]

    asyncio.run(talk())
    assert all(future.cancelled() for _, future in engine.held)


def test_several_answers_to_one_question(serve, engine) -> None:
    engine.script = [[6, 1], [7, 1], [6, 7, 1]]

    async def talk() -> None:
        async with serve(max_turns=4) as served:
            _, told = await post(served.base_url + "/chat/completions", {**BODY, "n": 3}, served.headers)
            assert [choice["message"]["content"] for choice in told["choices"]] == ["look", "here", "look here"]
            assert told["usage"] == {"prompt_tokens": 4, "completion_tokens": 7, "total_tokens": 11}
            assert (await post(served.base_url + "/chat/completions", {**BODY, "n": 2}, served.headers))[
                0
            ] == 400  # one is left
            chosen = [*HELLO, told["choices"][1]["message"], *HELLO]
            assert (await post(served.base_url + "/chat/completions", {"messages": chosen}, served.headers))[0] == 200
            assert (await post(served.base_url + "/chat/completions", BODY, served.headers))[0] == 400
            assert len(served.trajectory().segments) == 3  # the second went on

    asyncio.run(talk())


def test_what_would_change_the_policy_is_counted_and_not_heeded(serve, engine) -> None:
    counts = Counter()
    body = {**BODY, "temperature": 0.1, "tool_choice": "auto", "response_format": {"type": "json_object"}, "logit_bias": None}

    async def talk() -> None:
        async with serve(counts=counts) as served:
            for choice in ("auto", "required"):
                await post(served.base_url + "/chat/completions", {**body, "tool_choice": choice}, served.headers)

    asyncio.run(talk())
    assert counts == {"not_heeded/temperature": 2, "not_heeded/response_format": 2, "not_heeded/tool_choice": 1}
    assert {request.sampling.temperature for request in engine.requests} == {1.0}


def test_a_conversation_may_go_on_without_a_question(serve, ids) -> None:
    async def talk() -> Any:
        async with serve() as served:
            url = served.base_url + "/chat/completions"
            _, told = await post(url, BODY, served.headers)
            await post(url, {"messages": [*HELLO, told["choices"][0]["message"]]}, served.headers)
            return served.trajectory()

    made = asyncio.run(talk())
    assert (made.segments, made.token_ids) == ((0,), [6, 1, *ids("nl <assistant>"), 6, 1])


def test_new_tools_are_shown(serve, ids) -> None:
    """A conversation that goes on with other tools is rendered from its beginning: else the policy would not see them."""

    async def talk() -> Any:
        async with serve() as served:
            url = served.base_url + "/chat/completions"
            _, told = await post(url, BODY, served.headers)
            messages = [*HELLO, told["choices"][0]["message"], *HELLO]
            await post(url, {"messages": messages, "tools": [TOOL]}, served.headers)
            return served.trajectory()

    made = asyncio.run(talk())
    assert made.segments == (0, 2)
    assert made.token_ids[2:5] == ids("<system> look nl")


def test_what_the_engine_gives_up_is_not_tried_again(serve, engine) -> None:
    async def talk() -> None:
        async with serve() as served, aiohttp.ClientSession() as client:
            future = engine.submit_group  # one that fails
            engine.submit_group = lambda requests: [_failed()]
            async with client.post(served.base_url + "/chat/completions", json=BODY, headers=served.headers) as response:
                assert (response.status, response.headers["x-should-retry"]) == (500, "false")
                assert "the engine ended" in json.dumps(await response.json())
            engine.submit_group = future

    asyncio.run(talk())


def _failed() -> Any:
    from concurrent.futures import Future

    future: Future[Any] = Future()
    future.set_exception(RuntimeError("the engine ended"))
    return future
