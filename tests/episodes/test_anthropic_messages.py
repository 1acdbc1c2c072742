"""Anthropic's Messages API with the real SDK: what it parses, and what the session has of it."""

import asyncio
from typing import Any

import pytest

from asyncrl.episodes.apis import APIS
from asyncrl.episodes.conversations import Answer, CallRefused

pytest.importorskip("anthropic", reason="needs anthropic (pip install 'asyncrl[test]')")

API = APIS["/v1/messages"]
LOOK = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
CALL = 14  # the word that calls `look`
ASKED = {"model": "policy", "max_tokens": 50, "system": "here", "tools": [LOOK]}


def client_of(served: Any) -> Any:
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(base_url=served.base_url.removesuffix("/v1"), api_key=served.key, max_retries=0)


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_are_called_and_their_results_read(serve, engine, ids, streamed: bool) -> None:
    from anthropic.types import Message

    engine.script = [[6, CALL, CALL, 1], [7, 1]]

    async def create(client: Any, messages: list[Any]) -> Any:
        if not streamed:
            return await client.messages.create(messages=messages, **ASKED)
        async with client.messages.stream(messages=messages, **ASKED) as stream:
            return await stream.get_final_message()

    async def talk() -> Any:
        async with serve() as served, client_of(served) as client:
            messages: list[Any] = [{"role": "user", "content": "hello"}]
            counted = await client.messages.count_tokens(model="policy", messages=messages, tools=[LOOK], system="here")
            first = await create(client, messages)
            Message.model_validate(first.to_dict(), strict=True)
            text, one, other = first.content
            assert (first.stop_reason, text.text, one.name, one.input) == ("tool_use", "look ", "look", {"at": "here"})
            assert (counted.input_tokens, first.usage.input_tokens, first.usage.output_tokens) == (10, 10, 4)
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": "here"} for call in (one, other)]
            messages += [
                {"role": "assistant", "content": first.content},
                {"role": "user", "content": [*results, {"type": "text", "text": "hello"}]},
            ]
            second = await create(client, messages)
            assert (second.stop_reason, second.content[0].text) == ("end_turn", "here")
            return served.trajectory()

    made = asyncio.run(talk())
    assert made.segments == (0,)
    assert made.prompt_ids == tuple(ids("<system> look nl <system> here nl <user> hello nl <assistant>"))
    between = ids("nl <tool> here nl <tool> here nl <user> hello nl <assistant>")
    assert made.token_ids == [6, CALL, CALL, 1, *between, 7, 1]


def test_an_answer_without_text_has_an_empty_one() -> None:
    """Agents read content[0].text."""
    told = API.whole({}, [Answer(1, {"role": "assistant", "content": ""}, "length", 4, 1)])
    assert (told["content"], told["stop_reason"]) == ([{"type": "text", "text": ""}], "max_tokens")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], "content of type 'image'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the last message is the assistant's"),
    ],
)
def test_what_is_not_served(messages: list[Any], words: str) -> None:
    with pytest.raises(CallRefused, match=words):
        API.read({"messages": messages})


def test_errors_have_its_shape(serve) -> None:
    from anthropic import AuthenticationError, BadRequestError

    async def talk() -> None:
        async with serve() as served, client_of(served) as client:
            with pytest.raises(BadRequestError) as refused:
                await client.messages.create(model="policy", max_tokens=5, messages=[])
            assert refused.value.body["type"] == "error"
            assert refused.value.body["error"]["type"] == "invalid_request_error"
            with pytest.raises(AuthenticationError) as refused:
                await client.with_options(api_key="x").messages.create(messages=[{"role": "user", "content": "a"}], **ASKED)
            assert refused.value.body["error"]["type"] == "authentication_error"

    asyncio.run(talk())
