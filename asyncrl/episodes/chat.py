"""Chat messages as token ids, and answers as messages. What was sampled is never encoded again.

A template renders whole conversations. What follows an answer, its end and the next messages, is cut out of a rendering
with a stand-in for the answer; so the ids of a conversation are those that the policy read and sampled, one after the other,
whatever the template would do to earlier answers now (leave their reasoning out, say).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import Struct

from asyncrl.episodes.environments import Message
from asyncrl.errors import ConfigError

log = logging.getLogger(__name__)
# What one call is; the end of the last may be missing, cut by a limit.
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*"([^"]+)"')
_STAND_IN = "(asyncrl: here stands the answer)"  # nobody else writes that
_QUESTION: Message = {"role": "user", "content": "A question."}
UNREADABLE = "unreadable_call"  # the name of a call without one


class Turn(NamedTuple):
    """An answer of the policy. stopped: its end was sampled, it was not cut by a limit."""

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    stopped: bool


class Chat(Protocol):
    """How a family of models writes conversations. tools: JSON schemas of what the policy may call."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Of a conversation's beginning, up to where the policy is to answer."""

    def next_prompt(self, turn: Turn, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int] | None:
        """The turn's tokens as they are, and behind them the messages that follow. None: these can't, the whole conversation
        is to be rendered."""

    def reply(self, turn: Turn, tools: Sequence[Mapping[str, Any]] = ()) -> Message:
        """The assistant's message that the answer is, with `tool_calls` and `reasoning_content`. A call that can't be read has
        its text as arguments, so that whoever would do it tells the policy."""


class _Call(Struct):
    name: str
    arguments: dict[str, Any]


class TemplateChat:
    """A Chat by the tokenizer's own template. Calls of tools are read as Hermes, Qwen and others write them,
    `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

    Raises ConfigError for a template that changes an answer's text, so that what follows it could not be told.
    """

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = set(stop_token_ids)
        self._thinks = "</think>" in str(getattr(tokenizer, "chat_template", ""))
        self._following([_QUESTION], stopped=True)
        self._tell_what_is_otherwise()

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return self._encode(self._render(messages, [*tools] or None))

    def next_prompt(self, turn: Turn, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return [*turn.prompt_ids, *turn.ids, *self._following(messages, stopped=turn.stopped)]

    def _following(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        """Of what stands between two answers: the end of the first, unless it was sampled (`stopped`), and the messages."""
        rendered = self._render([_QUESTION, {"role": "assistant", "content": _STAND_IN}, *messages])
        _, found, after = rendered.rpartition(_STAND_IN)
        if not found:
            raise ConfigError(
                "the tokenizer's chat template does not show an assistant message's content as it is, so what follows an "
                "answer could not be told; use a template that does, or set episode.chat to the model's family"
            )
        ids = self._encode(after)
        return ids[1:] if stopped and ids and ids[0] in self._stops else ids

    def reply(self, turn: Turn, tools: Sequence[Mapping[str, Any]] = ()) -> Message:
        text = self._tokenizer.decode(turn.ids, skip_special_tokens=True)
        message: Message = {"role": "assistant"}
        begun = text.lstrip()
        if self._thinks and (begun.startswith("<think>") or self._opens_reasoning(turn.prompt_ids)):
            reasoning, _, text = begun.removeprefix("<think>").partition("</think>")
            message["reasoning_content"], text = reasoning.strip("\n"), text.lstrip("\n")
        message["content"], *_ = text.partition("<tool_call>")
        if written := _CALL.findall(text):
            message["tool_calls"] = [call_of(f"call_{i}", *_function(call)) for i, call in enumerate(written)]
        return message

    def _opens_reasoning(self, prompt_ids: Sequence[int]) -> bool:
        return str(self._tokenizer.decode([*prompt_ids[-8:]])).rstrip().endswith("<think>")

    def _tell_what_is_otherwise(self) -> None:
        """Than what is done here: how the template shows an answer in a longer conversation, and how calls of tools."""
        said = [_QUESTION, {"role": "assistant", "content": _STAND_IN, "reasoning_content": "Hm."}]
        short, long = (self._render(messages, prompt=False) for messages in (said, [*said, _QUESTION]))
        if not long.startswith(short):
            log.info(
                "the chat template shows earlier answers otherwise than they were sampled (without their reasoning, say): "
                "episodes go on with the tokens as they were; where an agent rewrites what was said, a new segment begins"
            )
        call = call_of("call_0", "look", {"at": 1})
        with suppress(Exception):  # a template that knows no such message
            shown = self._render([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
            if "look" in shown and ("look", {"at": 1}) not in map(_function, _CALL.findall(shown)):
                log.warning(
                    'the chat template does not write calls of tools as <tool_call>{"name": …, "arguments": {…}}</tool_call>: '
                    "a policy that calls as it has learned to is not understood; set episode.chat to the model's family"
                )

    def _render(self, messages: Sequence[Message], tools: list[Mapping[str, Any]] | None = None, *, prompt: bool = True) -> str:
        how = {"tokenize": False, "add_generation_prompt": prompt}
        return str(self._tokenizer.apply_chat_template([*messages], tools=tools, **how))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def unreadable(message: Message) -> int:
    """How many of the message's calls can't be read."""
    return sum(isinstance(call["function"]["arguments"], str) for call in message.get("tool_calls", ()))


def _function(written: str) -> tuple[str, dict[str, Any] | str]:
    """Name and arguments of a call; of one that can't be read its text instead of them."""
    try:
        call = msgspec.json.decode(written, type=_Call)
    except msgspec.MsgspecError:
        name = _NAME.search(written)
        return name[1] if name else UNREADABLE, written.strip()
    return call.name, call.arguments


def call_of(id: str, name: str, arguments: dict[str, Any] | str) -> Message:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
