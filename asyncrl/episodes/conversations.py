"""What an agent asks of the policy: chat messages in, messages out; all of it recorded by the token in a session."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from asyncrl.episodes.chat import Chat, Turn, unreadable
from asyncrl.episodes.environments import Message
from asyncrl.episodes.session import Session
from asyncrl.errors import AsyncRLError
from asyncrl.types import Generation, GenerationRequest

Ask = Callable[[GenerationRequest], Awaitable[Generation]]


class CallRefused(AsyncRLError):
    """A call that is the agent's mistake, or beyond the episode's budget. code: as in OpenAI's API; status: of HTTP."""

    def __init__(self, text: str, code: str = "invalid_request_error", status: int = 400) -> None:
        super().__init__(text)
        self.code, self.status = code, status


class Asked(Struct, frozen=True, kw_only=True):
    """A call, whichever API it came by. Messages and tools are as in OpenAI's chat completions."""

    messages: list[Message]
    tools: list[dict[str, Any]] = []
    system: str = ""  # stands before all messages
    follows: str = ""  # the number of an answer: the conversation up to it, without its `system`, comes before the messages
    max_tokens: int | None = None  # None: as many as there is room for
    n: int = 1  # answers


class Answer(NamedTuple):
    """The policy's message, and what it took."""

    number: int  # in its episode
    message: Message
    finish_reason: str
    prompt_tokens: int
    tokens: int


class Conversations:
    """An agent's calls within one episode, one after the other or side by side.

    Messages that begin with a conversation as it was served go on with its tokens; others are rendered from their beginning.
    That saves segments, no more: what is trained is right by the tokens alone (`Session`). max_turns: answers at most.
    """

    def __init__(self, session: Session, chat: Chat, ask: Ask, max_turns: int) -> None:
        self._session, self._chat, self._ask, self._max_turns = session, chat, ask, max_turns
        self._served: dict[tuple[Any, ...], Turn] = {}
        self._said: dict[str, list[Message]] = {}  # by number of the answer
        self._calls = 0  # answered or under way
        self._numbers = itertools.count(1)  # of answers
        self._made: dict[str, Any] = {}  # the policy's calls of functions, by id
        # Where there are tools: `tool_calls` that the policy made, and of them `tool_failures`, which can't be read.
        self.parts: Counter[str] = Counter()
        self.messages: list[Message] = []  # of the call that ended last

    async def complete(self, asked: Asked) -> list[Answer]:
        """The policy's answers. A call that is refused or cancelled leaves nothing. Raises CallRefused."""
        if self._calls + asked.n > self._max_turns:
            raise CallRefused(f"episode.max_turns={self._max_turns} calls were made: there are no more", "rate_limit_exceeded")
        messages, prompt_ids = self._read(asked)
        if not (room := self._session.room(prompt_ids)):
            raise CallRefused(f"prompt is too long: {len(prompt_ids)} tokens leave no room", "context_length_exceeded")
        requests = [self._session.request(prompt_ids, asked.max_tokens or room) for _ in range(asked.n)]
        self._calls += asked.n
        try:
            generations = await asyncio.gather(*map(self._ask, requests))
        except BaseException:
            self._calls -= asked.n
            raise
        made = zip(requests, generations, strict=True)
        return [self._answer(next(self._numbers), asked, messages, *one) for one in made]

    def count(self, asked: Asked) -> int:
        """Tokens of its prompt."""
        return len(self._read(asked)[1])

    def _answer(
        self, number: int, asked: Asked, messages: list[Message], request: GenerationRequest, made: Generation
    ) -> Answer:
        self._session.record(request, made)
        turn = Turn(request.prompt_ids, made.token_ids, made.finish_reason == "stop")
        message = self._chat.reply(turn, asked.tools)
        calls = message.get("tool_calls", ())
        for call in calls:
            call["id"] = f"{call['id']}_{number}"
            self._made[call["id"]] = call["function"]
        if asked.tools:
            self.parts.update({"tool_calls": len(calls), "tool_failures": unreadable(message)})
        self.messages = [*messages, message]
        self._served[_name(asked, self.messages)] = turn
        self._said[str(number)] = self.messages[bool(asked.system) :]
        reason = "tool_calls" if "tool_calls" in message else made.finish_reason
        return Answer(number, message, reason, len(request.prompt_ids), len(made.token_ids))

    def _read(self, asked: Asked) -> tuple[list[Message], list[int]]:
        """The whole conversation, and its tokens."""
        if asked.follows and asked.follows not in self._said:
            raise CallRefused("what it follows (previous_response_id) is no answer of this episode", status=404)
        system: list[Message] = [{"role": "system", "content": asked.system}] if asked.system else []
        messages = [*system, *self._said.get(asked.follows, ()), *asked.messages]
        if len(messages) == len(system):
            raise CallRefused("there are no messages")
        try:
            return messages, self._tokens(asked, messages)
        except CallRefused:
            raise
        except Exception as error:  # whatever a template makes of an agent's messages
            raise CallRefused(f"the chat template can't show these messages: {error!r}") from error

    def _tokens(self, asked: Asked, messages: list[Message]) -> list[int]:
        tools, *said = _name(asked, messages)
        for count in range(len(said), 0, -1):
            turn = self._served.get((tools, *said[:count]))
            if turn and (ids := self._chat.next_prompt(turn, list(map(self._shown, messages[count:])), asked.tools)):
                return ids
        return self._chat.prompt(list(map(self._shown, messages)), asked.tools)

    def _shown(self, message: Message) -> Message:
        """As templates take it: content as text, arguments of calls as objects, but those of the policy as it made them. What a
        tool answers stands under its name, which clients leave out."""
        shown = {name: value for name, value in message.items() if value is not None}
        shown["content"] = text_of(message.get("content"))
        if (made := self._made.get(message.get("tool_call_id") or "")) is not None:
            shown.setdefault("name", made["name"])
        if message["role"] == "developer":  # as newer models call it
            shown["role"] = "system"
        if calls := message.get("tool_calls"):
            functions = [self._made.get(call["id"]) or _called(**call["function"]) for call in calls]
            shown["tool_calls"] = [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]
        return shown


def text_of(content: Any) -> str:
    """Of a message's content: a text, nothing, or a list of parts. Raises CallRefused for what is no text."""
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    for part in parts:
        if not isinstance(part.get("text"), str):
            raise CallRefused(f"content of type {part.get('type')!r} is not taken: the policy reads text alone")
    return "".join(part["text"] for part in parts)


def _name(asked: Asked, messages: Sequence[Message]) -> tuple[Any, ...]:
    """What tells conversations apart, however a client echoes them: the tools, then the messages."""
    return msgspec.json.encode(asked.tools), *map(_normal, messages)


def _normal(message: Message) -> tuple[Any, ...]:
    calls = tuple(call["id"] for call in message.get("tool_calls") or ())
    return message["role"], text_of(message.get("content")), message.get("tool_call_id"), calls


def _called(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "arguments": json.loads(arguments or "{}") if isinstance(arguments, str) else arguments}
