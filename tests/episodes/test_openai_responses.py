"""OpenAI's Responses API with the real SDK: what it parses, and what the session has of it."""

import asyncio
import json
from typing import Any

import pytest

from asyncrl.episodes.apis import APIS
from asyncrl.episodes.conversations import Answer, CallRefused

pytest.importorskip("openai", reason="needs openai (pip install 'asyncrl[test]')")

API = APIS["/v1/responses"]
LOOK = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
CALL = 14  # the word that calls `look`
QUESTION = "hello"


def client_of(served: Any) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=served.base_url, api_key=served.key, max_retries=0)


def check(response: Any) -> None:
    """As strictly as the SDK can, which else takes anything."""
    from openai.types.responses import Response

    Response.model_validate(response.to_dict(), strict=True)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("by_id", [False, True])
def test_a_tool_is_called_and_its_result_read(serve, engine, ids, by_id: bool, streamed: bool) -> None:
    engine.script = [[6, CALL, 1], [7, 1]]

    async def create(client: Any, **how: Any) -> Any:
        if not streamed:
            return await client.responses.create(model="policy", tools=[LOOK], instructions="here", **how)
        async with client.responses.stream(model="policy", tools=[LOOK], instructions="here", **how) as stream:
            events = [event async for event in stream]
            assert [event.sequence_number for event in events] == list(range(len(events)))
            return await stream.get_final_response()

    async def talk() -> Any:
        async with serve() as served, client_of(served) as client:
            first = await create(client, input=QUESTION)
            check(first)
            said, call = first.output
            assert (first.status, first.output_text, said.type) == ("completed", "look ", "message")
            assert (call.name, json.loads(call.arguments)) == ("look", {"at": "here"})
            assert (first.usage.input_tokens, first.usage.output_tokens) == (10, 3)
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "here"}
            if by_id:
                second = await create(client, input=[result], previous_response_id=first.id)
            else:
                echoed = [item.to_dict() for item in first.output]
                second = await create(client, input=[{"role": "user", "content": QUESTION}, *echoed, result])
            check(second)
            assert (second.output_text, second.usage.input_tokens) == ("here", 18)
            return served.trajectory()

    made = asyncio.run(talk())
    assert made.segments == (0,)
    assert made.prompt_ids == tuple(ids("<system> look nl <system> here nl <user> hello nl <assistant>"))
    assert made.token_ids == [6, CALL, 1, *ids("nl <tool> here nl <assistant>"), 7, 1]


def test_the_events_of_a_stream(serve, engine) -> None:
    engine.script = [[CALL, CALL, 1]]

    async def talk() -> list[Any]:
        async with serve() as served, client_of(served) as client:
            return [event async for event in await client.responses.create(model="policy", input=QUESTION, stream=True)]

    events = asyncio.run(talk())
    item = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds == ["created", "in_progress", *item, *item, "completed"]
    for event in events:
        type(event).model_validate(event.to_dict(), strict=True)
    ids = [item.call_id for item in events[-1].response.output]
    assert len({*ids}) == 2  # that of each result is told by it


def test_an_answer_that_is_cut_is_incomplete() -> None:
    answer = Answer(3, {"role": "assistant", "content": "look"}, "length", 4, 2)
    told = API.whole({}, [answer])
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    *_, last = API.events({}, [answer])
    assert last["type"] == "response.incomplete"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": QUESTION, "conversation": "c"}, "conversation is not served"),
        ({"input": QUESTION, "background": True}, "background is not served"),
        ({"input": QUESTION, "tools": [{"type": "web_search"}]}, "tools of type 'web_search'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "type 'input_image'"),
    ],
)
def test_what_is_not_served(body: dict[str, Any], words: str) -> None:
    with pytest.raises(CallRefused, match=words):
        API.read(body)


def test_an_answer_of_another_episode_is_not_found(serve) -> None:
    from openai import NotFoundError

    async def talk() -> None:
        async with serve() as served, client_of(served) as client:
            await client.responses.create(model="policy", input=QUESTION, previous_response_id="resp_7")

    with pytest.raises(NotFoundError, match="no answer of this episode"):
        asyncio.run(talk())
