"""An agent's messages as the chat and the session see them: calls that can't be read, names of tools, calls side by side."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from asyncrl.episodes.chat import UNREADABLE, Turn, call_of
from asyncrl.episodes.conversations import Answer, Asked, Conversations
from asyncrl.episodes.session import Budget, Session
from asyncrl.types import Episode, Generation, GenerationRequest, Sampling, Span, Version

USER = {"role": "user", "content": "hello"}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


class FakeChat:
    """Says what it was told to, calls included; writes down what is to be shown."""

    def __init__(self, *calls: tuple[str, object]) -> None:
        self.calls, self.shown, self.follows = calls, [], True

    def prompt(self, messages: Sequence[dict], tools: Sequence[dict] = ()) -> list[int]:
        self.shown.append([dict(message) for message in messages])
        return [2] * len(messages)

    def next_prompt(self, turn: Turn, messages: Sequence[dict], tools: Sequence[dict] = ()) -> list[int] | None:
        if not self.follows:
            return None
        self.shown.append([dict(message) for message in messages])
        return [*turn.prompt_ids, *turn.ids, *[3] * len(messages)]

    def reply(self, turn: Turn, tools: Sequence[dict] = ()) -> dict:
        calls = [call_of(f"call_{i}", name, arguments) for i, (name, arguments) in enumerate(self.calls)]
        return {"role": "assistant", "content": ""} | ({"tool_calls": calls} if calls else {})


@pytest.fixture
def make() -> Callable[[FakeChat], tuple[Conversations, Session]]:
    def made(chat: FakeChat) -> tuple[Conversations, Session]:
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,))
        session = Session("5/0/0", 5, sampling, 77, Budget(tokens=100, turn_tokens=4, context=100))

        async def ask(request: GenerationRequest) -> Generation:
            await asyncio.sleep(0)  # whoever asks side by side
            return Generation(
                id=request.id,
                token_ids=[7, 1],
                logprobs=[-1.0, -2.0],
                kept_logmass=None,
                spans=(Span(Version(1, 0), 2),),
                finish_reason="stop",
            )

        return Conversations(session, chat, ask, max_turns=9), session

    return made


def complete(conversations: Conversations, *messages: dict) -> Answer:
    return asyncio.run(conversations.complete(Asked(messages=list(messages), tools=TOOLS)))[0]


def echoed(answer: Answer) -> dict:
    """As a client of OpenAI's sends it back: arguments as text, no more than it was served."""
    calls = [
        {
            **call,
            "function": {**call["function"], "arguments": '{"at": 1}' if call["function"]["name"] == "look" else "look(1)"},
        }
        for call in answer.message["tool_calls"]
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_calls_that_cannot_be_read_are_counted_and_shown_as_they_were(make) -> None:
    chat = FakeChat(("look", {"at": 1}), (UNREADABLE, "look(1)"))
    conversations, session = make(chat)
    answer = complete(conversations, USER)
    assert answer.finish_reason == "tool_calls"
    assert conversations.parts == {"tool_calls": 2, "tool_failures": 1}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "here"} for call in answer.message["tool_calls"]]
    complete(conversations, USER, echoed(answer), *results)
    assert [message["name"] for message in chat.shown[-1]] == ["look", UNREADABLE]  # which clients leave out
    assert conversations.parts == {"tool_calls": 4, "tool_failures": 2}
    assert session.trajectory(Episode()).segments == (0,)


def test_a_turn_that_nothing_can_follow_is_rendered_whole(make) -> None:
    chat = FakeChat(("look", {"at": 1}), (UNREADABLE, "look(1)"))
    chat.follows = False
    conversations, _ = make(chat)
    answer = complete(conversations, USER)
    complete(conversations, USER, echoed(answer), {"role": "user", "content": "Well?"})
    assert [message["role"] for message in chat.shown[-1]] == ["user", "assistant", "user"]
    shown = [call["function"]["arguments"] for call in chat.shown[-1][1]["tool_calls"]]
    assert shown == [{"at": 1}, "look(1)"]


def test_calls_of_answers_side_by_side_have_names_of_their_own(make) -> None:
    conversations, _ = make(FakeChat(("look", {"at": 1})))

    async def both() -> list[list[Answer]]:
        return await asyncio.gather(*(conversations.complete(Asked(messages=[USER], tools=TOOLS)) for _ in range(2)))

    assert len({answer.message["tool_calls"][0]["id"] for (answer,) in asyncio.run(both())}) == 2


def test_without_tools_there_is_nothing_to_count(make) -> None:
    conversations, _ = make(FakeChat())
    asyncio.run(conversations.complete(Asked(messages=[USER])))
    assert not conversations.parts
