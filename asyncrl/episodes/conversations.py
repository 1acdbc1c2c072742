"""What an agent asks of the policy: chat messages in, a message out; all of it recorded by the token in a session."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from asyncrl.episodes.chat import Chat
from asyncrl.episodes.environments import Message
from asyncrl.episodes.session import Session
from asyncrl.errors import AsyncRLError
from asyncrl.types import Generation, GenerationRequest

Ask = Callable[[GenerationRequest], Awaitable[Generation]]


class CallRefused(AsyncRLError):
    """A call that is the agent's mistake, or beyond the episode's budget. code: as in OpenAI's API."""

    def __init__(self, text: str, code: str = "invalid_request_error") -> None:
        super().__init__(text)
        self.code = code


class Answer(NamedTuple):
    """The policy's message, and what it took."""

    message: Message
    finish_reason: str
    prompt_tokens: int
    tokens: int


class Conversations:
    """An agent's calls within one episode, one after the other or side by side.

    Messages that begin with a conversation as it was served go on with its tokens; others are rendered from their beginning.
    That saves segments, no more: what is trained is right by the tokens alone (`Session`). max_turns: calls at most.
    """

    def __init__(self, session: Session, chat: Chat, ask: Ask, max_turns: int) -> None:
        self._session, self._chat, self._ask, self._max_turns = session, chat, ask, max_turns
        self._served: dict[tuple[Any, ...], tuple[list[int], bool]] = {}  # tokens, and whether their end was sampled
        self._calls = 0
        self.messages: list[Message] = []  # of the call that ended last

    async def complete(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], max_tokens: int) -> Answer:
        """The policy's answer, of at most max_tokens tokens. Raises CallRefused."""
        if self._calls >= self._max_turns:
            raise CallRefused(f"episode.max_turns={self._max_turns} calls were made: there are no more", "rate_limit_exceeded")
        self._calls += 1
        said = tuple(map(_normal, messages))
        prompt_ids = self._prompt(messages, said, tools)
        if not self._session.room(prompt_ids):
            raise CallRefused(f"a prompt of {len(prompt_ids)} tokens leaves no room for an answer", "context_length_exceeded")
        request = self._session.request(prompt_ids, max_tokens)
        answer = await self._ask(request)
        self._session.record(request, answer)
        message = self._chat.reply(answer.token_ids)
        for call in message.get("tool_calls", ()):
            call["id"] = f"{call['id']}_{self._calls}"
        self._served[(*said, _normal(message))] = [*prompt_ids, *answer.token_ids], answer.finish_reason == "stop"
        self.messages = [*messages, message]
        reason = "tool_calls" if "tool_calls" in message else answer.finish_reason
        return Answer(message, reason, len(prompt_ids), len(answer.token_ids))

    def _prompt(self, messages: Sequence[Message], said: tuple[Any, ...], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        try:
            for count in range(len(said) - 1, 0, -1):
                if (served := self._served.get(said[:count])) is not None:
                    following = [_shown(message) for message in messages[count:]]
                    return [*served[0], *self._chat.following(following, stopped=served[1])]
            return self._chat.prompt([_shown(message) for message in messages], [dict(tool) for tool in tools])
        except Exception as error:  # whatever a template makes of an agent's messages
            raise CallRefused(f"the chat template can't show these messages: {error!r}") from error


def _text(content: Any) -> str:
    """Of a message's content: a text, nothing, or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def _normal(message: Message) -> tuple[Any, ...]:
    """What tells messages apart, however a client echoes them."""
    calls = tuple(call["id"] for call in message.get("tool_calls") or ())
    return message["role"], _text(message.get("content")), message.get("tool_call_id"), calls


def _shown(message: Message) -> Message:
    """As templates take it: content as text, arguments of calls as objects."""
    shown = {name: value for name, value in message.items() if value is not None} | {"content": _text(message.get("content"))}
    if calls := message.get("tool_calls"):
        functions = [{**call["function"], "arguments": json.loads(call["function"]["arguments"])} for call in calls]
        shown["tool_calls"] = [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]
    return shown
