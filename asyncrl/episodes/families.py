"""Families of models that write conversations otherwise than most, by the package `renderers` (Apache-2.0)."""

from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl.episodes.chat import UNREADABLE, Chat, TemplateChat, Turn, call_of
from asyncrl.episodes.environments import Message
from asyncrl.errors import ConfigError


def chat_of(tokenizer: Any, stop_token_ids: Sequence[int], family: str = "") -> Chat:
    """By the tokenizer's template, or as the family writes. Raises ConfigError."""
    return FamilyChat(tokenizer, stop_token_ids, family) if family else TemplateChat(tokenizer, stop_token_ids)


class FamilyChat:
    """A Chat (asyncrl.episodes.chat) of the family that `renderers` knows by this name. Raises ConfigError for one that it does
    not know, for a tokenizer that lacks the family's tokens, and where an answer would not stop at all of its ends."""

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int], family: str) -> None:
        try:
            from renderers import create_renderer
            from renderers.configs import config_from_name

            # Earlier answers stay as they were sampled, across messages of the user too.
            config: Any = config_from_name(family)
            self._renderer = create_renderer(tokenizer, config.model_copy(update={"thinking_retention": "all"}))
        except Exception as error:
            raise ConfigError(
                f"episode.chat={family!r}: {error}; name the tokenizer's family as `renderers` does (pip install "
                "'asyncrl[agents]'), or nothing, for its own template"
            ) from error
        if missing := sorted({*self._renderer.get_stop_token_ids()} - {*stop_token_ids}):
            raise ConfigError(
                f"episode.chat={family!r} ends answers with token {missing} too, which does not end the model's: they would "
                f"run on past it; set model.override_config.eos_token_id to {sorted({*missing, *stop_token_ids})}"
            )

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        ids: list[int] = self._renderer.render_ids([*messages], tools=[*tools] or None, add_generation_prompt=True)
        return ids

    def next_prompt(self, turn: Turn, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int] | None:
        made = self._renderer.bridge_to_next_turn([*turn.prompt_ids], [*turn.ids], [*messages], tools=[*tools] or None)
        return None if made is None else list(made.token_ids)

    def reply(self, turn: Turn, tools: Sequence[Mapping[str, Any]] = ()) -> Message:
        parsed = self._renderer.parse_response([*turn.ids], tools=[*tools] or None, prompt_ids=[*turn.prompt_ids])
        message: Message = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning_content is not None:
            message["reasoning_content"] = parsed.reasoning_content
        if parsed.tool_calls:
            message["tool_calls"] = [
                call_of(call.id or f"call_{i}", call.name or UNREADABLE, call.arguments if _is_read(call) else call.raw)
                for i, call in enumerate(parsed.tool_calls)
            ]
        return message


def _is_read(call: Any) -> bool:
    return isinstance(call.arguments, dict) and call.status in ("ok", "unknown_tool")
