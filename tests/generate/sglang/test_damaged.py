"""Damaged responses of a server: each costs its request or its server a clear error. Nothing else comes out of the client and
the rows (whatever else would, ends the engine), and no value that the learner could not use.

By hand, for longer: ASYNCRL_FUZZ=200000 pytest tests/generate/sglang/test_damaged.py -k fuzz -s
"""

import asyncio
import json
import os
import random
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from typing import Any

import pytest
from aiohttp import web

from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.client import SGLangClient
from asyncrl.generate.sglang.segments import RequestRow
from asyncrl.generate.sglang.wire import ANYTHING, FACTS, LOADS, REFUSAL, Unreadable, decode
from asyncrl.types import Generation, GenerationRequest, Sampling, Version

WAIT_S = 60.0
VOCABULARY, TOKENS = 50, 6
CASES = int(os.environ.get("ASYNCRL_FUZZ", "600"))
V1, V2 = Version(1, 1), Version(1, 2)


def make_rows(tokens: int = TOKENS) -> list[RequestRow]:
    """Two, of which one wants the mass that top-p kept."""
    rows = []
    for index, top_p in enumerate((1.0, 0.9)):
        sampling = Sampling(temperature=1.0, top_p=top_p, top_k=0, max_tokens=tokens, stop_token_ids=())
        request = GenerationRequest(id=f"7/{index}", group=7, prompt_ids=(1, 2), sampling=sampling, seed=0)
        rows.append(RequestRow(request, VOCABULARY))
        rows[-1].begin(V1)
        rows[-1].swapping(V2)
    return rows


def news(index: int, start: int, end: int, **changed: Any) -> dict[str, Any]:
    """An event as SGLang sends it: tokens `start` to `end` of row `index`. changed: fields of its meta_info."""
    meta = {
        "id": f"7/{index}#1",
        "completion_tokens": end,
        "finish_reason": {"type": "length", "length": TOKENS} if end == TOKENS else None,
        "output_token_logprobs": [[-token / 8, 10 + token, None] for token in range(start, end)],
        "output_token_sampling_logprobs": [-token / 16 for token in range(start, end)],
        "weight_versions": [{"version": "1.1", "start": 0, "end": 2}, {"version": "1.2", "start": 2, "end": end}],
        "num_retractions": 1,
        "e2e_latency": 0.25,
    }
    return {"index": index, "output_ids": list(range(10 + start, 10 + end)), "meta_info": meta | changed}


def events() -> list[dict[str, Any]]:
    return [news(0, 0, 3), news(1, 0, 2), news(1, 2, TOKENS), news(0, 3, TOKENS)]


def stream(made: list[Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in made) + b"data: [DONE]\n\n"


Check = Callable[[SGLangClient, Callable[[bytes], None]], Any]


def with_server(answering: Any, check: Check) -> None:
    """Runs `check(client, say)`; say(body): what the server responds with from then on."""

    async def run() -> None:
        body = b""

        def say(next_body: bytes) -> None:
            nonlocal body
            body = next_body

        async def respond(request: web.Request) -> web.Response:
            return web.Response(body=body)

        async with answering(respond) as url:
            client = SGLangClient(url)
            try:
                await check(client, say)
            finally:
                await client.close()

    asyncio.run(run())


async def generations(client: SGLangClient, stream_interval: int) -> list[Generation]:
    """As the replica does it. stream_interval: above TOKENS, the response comes in one piece."""
    rows, reasons = make_rows(), ["abort", "abort"]
    async with asyncio.timeout(WAIT_S):
        async for chunk in client.generate(rows, salt=None, stream_interval=stream_interval):
            reasons[chunk.index] = rows[chunk.index].extend(chunk) or "abort"
    return [row.generation(reason) for row, reason in zip(rows, reasons, strict=True)]  # type: ignore[arg-type]


def sound(answer: Generation) -> bool:
    """Whether the learner can use it."""
    count = len(answer.token_ids)
    kept = [0.0] * count if answer.kept_logmass is None else answer.kept_logmass
    return (
        all(0 <= token < VOCABULARY for token in answer.token_ids)
        and all(isfinite(value) for value in array("f", [*answer.logprobs, *kept]))  # as the store keeps them
        and len(answer.logprobs) == len(kept) == count == sum(span.length for span in answer.spans) <= TOKENS
        and {span.version for span in answer.spans} <= {V1, V2}
    )


def test_what_is_not_damaged_is_taken_as_it_is(answering: Any) -> None:
    async def check(client: SGLangClient, say: Callable[[bytes], None]) -> None:
        for interval, body in ((1, stream(events())), (64, json.dumps([news(0, 0, TOKENS), news(1, 0, TOKENS)]).encode())):
            say(body)
            answers = await generations(client, interval)
            assert all(sound(answer) and answer.token_ids == list(range(10, 16)) for answer in answers)
            assert [answer.finish_reason for answer in answers] == ["length", "length"]

    with_server(answering, check)


DIGITS = "9" * 5000  # more than Python turns into an int
META: dict[str, tuple[str, str]] = {
    # what is damaged: (JSON of one field, its value)
    "a logprob that is not a number": ("output_token_logprobs", "[[NaN, 10, null]]"),
    "a logprob that SGLang could not write": ("output_token_logprobs", "[[null, 10, null]]"),
    "a logprob beyond all floats": ("output_token_logprobs", "[[-1e400, 10, null]]"),
    "a logprob beyond float32": ("output_token_logprobs", "[[-1e300, 10, null]]"),
    "a probability above 1": ("output_token_logprobs", "[[0.5, 10, null]]"),
    "a token id below 0": ("output_token_logprobs", "[[-1, -1, null]]"),
    "a token id with a fraction": ("output_token_logprobs", "[[-1, 1.5, null]]"),
    "a token id of 5000 digits": ("output_token_logprobs", f"[[-1, {DIGITS}, null]]"),
    "text in place of a token": ("output_token_logprobs", '[[-1, "10", null]]'),
    "a token in two parts": ("output_token_logprobs", "[[-1, 10]]"),
    "no list": ("output_token_logprobs", "{}"),
    "a count below 0": ("completion_tokens", "-1"),
    "a count of 5000 digits": ("completion_tokens", DIGITS),
    "an end without a kind": ("finish_reason", "{}"),
    "an end of no known kind": ("finish_reason", '{"type": "tired"}'),
    "a label that begins before 0": ("weight_versions", '[{"version": "1.1", "start": -1, "end": 3}]'),
    "retractions of 5000 digits": ("num_retractions", DIGITS),
    "a million brackets": ("num_retractions", "[" * 1_000_000),
    "a million brackets where nobody looks": ("customized_info", "[" * 1_000_000),
    "no UTF-8": ("finish_reason", '{"type": "\udcff"}'),
}


@pytest.mark.parametrize("damage", META)
@pytest.mark.parametrize("interval", [1, 64], ids=["stream", "batch"])
def test_a_value_that_cannot_be_costs_the_server_an_error(answering: Any, damage: str, interval: int) -> None:
    name, value = META[damage]
    whole = json.dumps(news(0, 0, 1, **{name: "HERE"})).replace('"HERE"', value).encode(errors="surrogateescape")

    async def check(client: SGLangClient, say: Callable[[bytes], None]) -> None:
        say(b"data: " + whole + b"\n\n" if interval == 1 else b"[" + whole + b"]")
        with pytest.raises(Unavailable, match="/generate sent what asyncrl can't read"):
            await generations(client, interval)

    with_server(answering, check)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([news(2, 0, 3)], "news of its request 2, of 2, which has ended or never was"),
        ([news(0, 0, TOKENS), news(0, 0, TOKENS)], "news of its request 0, of 2, which has ended or never was"),
        ([news(0, 0, TOKENS), news(1, 0, 3)], "ended before 1 of its 2 requests had"),
        ([], "ended before 2 of its 2 requests had"),
        ([news(0, 0, 3) | {"index": -1}], "sent what asyncrl can't read"),
        ([{"index": 0}], "sent what asyncrl can't read"),
        ([None], "sent what asyncrl can't read"),
    ],
)
def test_a_stream_must_have_news_of_its_requests_until_all_have_ended(answering: Any, made: list[Any], words: str) -> None:
    async def check(client: SGLangClient, say: Callable[[bytes], None]) -> None:
        say(stream(made))
        with pytest.raises(Unavailable, match=words):
            await generations(client, 1)

    with_server(answering, check)


@pytest.mark.parametrize(
    ("indices", "words"),
    [((0,), "ended before 1 of its 2 requests had"), ((0, 1, 0), "request 2, of 2, which has ended or never was")],
)
def test_a_batch_must_have_one_answer_per_request(answering: Any, indices: tuple[int, ...], words: str) -> None:
    async def check(client: SGLangClient, say: Callable[[bytes], None]) -> None:
        say(json.dumps([news(index, 0, TOKENS) for index in indices]).encode())
        with pytest.raises(Unavailable, match=words):
            await generations(client, 64)

    with_server(answering, check)


def test_a_refusal_is_told_from_an_answer_that_only_mentions_an_error(answering: Any) -> None:
    async def check(client: SGLangClient, say: Callable[[bytes], None]) -> None:
        for interval in (1, 64):
            for body, error in (
                (b'{"error": {"message": "too long"}}', ConfigError),
                (b'{"error": "too long"}', ConfigError),
                (b'{"meta_info": {"finish_reason": {"message": "error"', Unavailable),
                (b'{"error": {"message": "too lo', Unavailable),
                (b'{"error": null}', Unavailable),
            ):
                say(b"data: " + body + b"\n\n" if interval == 1 else body)
                with pytest.raises(error):
                    await generations(client, interval)

    with_server(answering, check)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b'{"loads": null}',
        b'{"loads": [{"token_usage": null}]}',
        b'{"tp_size": 0}',
        b'{"dp_size": "2"}',
        b"{",
    ],
)
def test_what_a_server_says_of_itself_is_checked_as_well(answering: Any, text: bytes) -> None:
    async def check(client: SGLangClient, say: Callable[[bytes], None]) -> None:
        say(text)
        with pytest.raises(Unavailable, match="/x sent what asyncrl can't read"):
            await client.get("/x", FACTS if b"_size" in text else LOADS, WAIT_S)

    with_server(answering, check)


# ------------------------------------------------------------------------------------------------ any damage

ODD = [
    "-1",
    "1e400",
    "-1e300",
    "1.5",
    "-0.0",
    "NaN",
    "Infinity",
    "null",
    "true",
    '"1"',
    "[]",
    "{}",
    DIGITS,
    str(2**31),
    str(2**63),
]


def damaged(body: bytes, chance: random.Random) -> bytes:
    """The body, hurt in one to three places."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(body) + 1)
        end = min(len(body), at + chance.randint(1, 40))
        how = chance.randrange(7)
        if how == 0:  # bits
            body = body[:at] + bytes(byte ^ 1 << chance.randrange(8) for byte in body[at : at + 1]) + body[at + 1 :]
        elif how == 1:
            body = body[:at]
        elif how == 2:
            body = body[:at] + body[end:]
        elif how == 3:
            body = body[:end] + body[at:]
        elif how == 4:
            body = body[:at] + chance.choice([b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"[" * 100_000, b"\n\n", b'"']) + body[at:]
        else:  # a number, as most of a response is
            digits = [i for i, byte in enumerate(body) if byte in b"0123456789"]
            if digits:
                start = stop = chance.choice(digits)
                while stop < len(body) and body[stop] in b"0123456789.":
                    stop += 1
                body = body[:start] + chance.choice(ODD).encode() + body[stop:]
    return body


def test_fuzz_nothing_but_a_sound_answer_or_a_named_error_comes_of_a_damaged_response(answering: Any) -> None:
    chance, outcomes = random.Random(9), Counter[str]()
    bodies = {1: stream(events()), 64: json.dumps([news(0, 0, TOKENS), news(1, 0, TOKENS)]).encode()}

    async def check(client: SGLangClient, say: Callable[[bytes], None]) -> None:
        for case in range(CASES):
            interval = chance.choice([1, 64])
            body = damaged(bodies[interval], chance)
            say(body)
            try:
                answers = await generations(client, interval)
            except (Unavailable, ConfigError) as error:
                outcomes[type(error).__name__] += 1
                continue
            outcomes["taken"] += 1
            assert all(sound(answer) for answer in answers), (case, body)

    with_server(answering, check)
    print(dict(outcomes))
    assert outcomes["Unavailable"] > CASES / 3
    assert outcomes["taken"] > 0  # some damage leaves a response sound


def test_fuzz_decoding_raises_nothing_but_unreadable() -> None:
    chance = random.Random(10)
    texts = [
        b'{"tp_size": 1, "dp_size": 1}',
        b'{"loads": [{"num_waiting_reqs": 3, "token_usage": 0.5}]}',
        b'{"error": {"a": 1}}',
    ]
    for _ in range(CASES):
        body = damaged(chance.choice(texts), chance)
        for decoder in (FACTS, LOADS, REFUSAL, ANYTHING):
            with suppress(Unreadable):
                decode(decoder, body)  # type: ignore[arg-type]
