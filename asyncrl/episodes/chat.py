"""Chat messages as token ids, by the tokenizer's own template. What was sampled is never encoded again.

A template renders whole conversations. What follows an answer, its end and the next messages, is cut out of a rendering
with a stand-in for the answer; so the ids of a conversation are those that the policy read and sampled, one after the other,
whatever the template would do to earlier answers now (leave their reasoning out, say).
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from asyncrl.episodes.environments import Message
from asyncrl.errors import ConfigError

# What one call is; the end of the last may be missing, cut by a limit.
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_STAND_IN = "(asyncrl: here stands the answer)"  # nobody else writes that
_QUESTION: Message = {"role": "user", "content": "A question."}


class _Call(Struct):
    name: str
    arguments: dict[str, Any]


def _function(written: str) -> dict[str, Any]:
    try:
        call = msgspec.json.decode(written, type=_Call)
    except msgspec.MsgspecError:
        call = _Call(name=written.strip(), arguments={})
    return {"name": call.name, "arguments": call.arguments}


class Chat:
    """tokenizer: with a chat template. stop_token_ids: those that end an answer. Raises ConfigError for a template that changes
    an answer's text, so that what follows it could not be told."""

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = set(stop_token_ids)
        self.following([_QUESTION], stopped=True)

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Of a conversation's beginning, up to where the policy is to answer. tools: JSON schemas of what it may call."""
        return self._encode(self._render(messages, [*tools] or None))

    def following(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        """Of what stands between two answers: the end of the first, unless it was sampled (`stopped`), and the messages."""
        rendered = self._render([_QUESTION, {"role": "assistant", "content": _STAND_IN}, *messages])
        _, found, after = rendered.rpartition(_STAND_IN)
        if not found:
            raise ConfigError(
                "the tokenizer's chat template does not show an assistant message's content as it is, so what follows an "
                "answer could not be told; use a template that does"
            )
        ids = self._encode(after)
        return ids[1:] if stopped and ids and ids[0] in self._stops else ids

    def reply(self, ids: Sequence[int]) -> Message:
        """The assistant's message that the policy's tokens are. Calls of tools are read as Hermes, Qwen and others write them,
        `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; one that can't be read is a call of no tool, so that the
        environment tells the policy."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        content, *_ = text.partition("<tool_call>")
        functions = [_function(written) for written in _CALL.findall(text)]
        calls = [{"id": f"call_{i}", "type": "function", "function": function} for i, function in enumerate(functions)]
        return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})

    def _render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        how = {"tokenize": False, "add_generation_prompt": True}
        return str(self._tokenizer.apply_chat_template([*messages], tools=tools, **how))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
