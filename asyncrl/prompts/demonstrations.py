"""Demonstrations for supervised learning: prompts with their responses, or whole conversations, as token ids.

The tokens are those that generation would see and make: a prompt with the assistant's turn opened, tokenized by itself, then
the response up to its stop token. So a warm start trains exactly what a rollout samples.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asyncrl.config import DemonstrationsSpec
from asyncrl.errors import ConfigError, DataError
from asyncrl.prompts.encoding import require_template
from asyncrl.prompts.reading import Messages, Text, as_text, first_record, records, shown, value_at

_CHUNK_ROWS = 1024  # tokenized together: per row, the calls would take longer than the work


class Demonstration(NamedTuple):
    """ids [L] int64, from the first to the last token to learn. learned [t] int64: positions to learn, rising, each >= 1."""

    ids: np.ndarray
    learned: np.ndarray


class Demonstrations(NamedTuple):
    """In the files' order. too_long: how many more there were, longer than the bound and left out."""

    examples: list[Demonstration]
    too_long: int


class _Segment(NamedTuple):
    """Tokenized by itself. plain: the tokenizer adds its own special tokens; a chat template has written them already."""

    text: str
    learned: bool = False
    plain: bool = False


_Row = tuple[str, list[_Segment]]  # where, for errors; the last segment is a learned one


def read_demonstrations(
    files: Sequence[str], spec: DemonstrationsSpec, tokenizer: Any, stop_ids: Sequence[int], max_length: int
) -> Demonstrations:
    """Tokenizes every row of `files` into memory.

    stop_ids: tokens that end a response. It is learned up to its first; where there is none at the example's end, the
    tokenizer's end of sequence is added. (A template that ends turns without one does not teach to end earlier turns.)
    Raises DataError naming file and row, or if nothing is left; ConfigError for a tokenizer that can't do it.
    """
    stop = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stop_ids), None)
    if stop is None:
        raise ConfigError("neither tokenizer nor model names an end of sequence: no response would learn to end; set eos_token")
    examples, lengths = [], []
    rows = _rows(files, spec, tokenizer)
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
        for example in _encode(chunk, tokenizer, {stop, *stop_ids}, stop):
            lengths.append(len(example.ids))
            if lengths[-1] <= max_length:
                examples.append(example)
    if not examples:
        found = f"all {len(lengths)} examples are longer than {max_length} tokens (the shortest has {min(lengths, default=0)})"
        raise DataError(f"{', '.join(files)}: {found if lengths else 'no rows'}: nothing is left; raise data.max_length")
    return Demonstrations(examples, too_long=len(lengths) - len(examples))


def check_demonstrations(files: Sequence[str], spec: DemonstrationsSpec) -> None:
    """Proves that each file exists and its first row is well-formed, without reading more. Raises DataError."""
    for file in files:
        _turns(*first_record(file, "to learn from"), spec)


def _rows(files: Sequence[str], spec: DemonstrationsSpec, tokenizer: Any) -> Iterator[_Row]:
    for file in files:
        for where, record in records(Path(file)):
            text, response = _turns(where, record, spec)
            if isinstance(text, str):
                prompt = _Segment(text, plain=True)
            elif response is not None:
                prompt = _Segment(_render(where, tokenizer, text, opened=True))
            else:
                yield where, _conversation(where, tokenizer, text)
                continue
            yield where, [prompt, _Segment(response or "", learned=True)]


def _turns(where: str, record: Mapping[str, Any], spec: DemonstrationsSpec) -> tuple[Text, str | None]:
    """A prompt and its response; or a conversation, and None."""
    if spec.messages_key:
        key, field = spec.messages_key, "data.messages_key"
        messages = as_text(value_at(record, key, field, where), key, where, field)
        if isinstance(messages, str):
            raise DataError(
                f"{where}: {key!r} ({field}) is {shown(messages)}; expected a list of chat messages {{role, content}}"
            )
        if not any(message["role"] == "assistant" and message["content"] for message in messages):
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{where}: {key!r} ({field}) has no turn of role 'assistant' with content (roles: {roles}): nothing to learn"
            )
        return messages, None
    prompt = as_text(value_at(record, spec.prompt_key, "data.prompt_key", where), spec.prompt_key, where)
    response = value_at(record, spec.response_key, "data.response_key", where)
    if not isinstance(response, str) or not response:
        raise DataError(
            f"{where}: {spec.response_key!r} (data.response_key) is {shown(response)}; expected a non-empty string "
            "(whole conversations: name their column in data.messages_key)"
        )
    return prompt, response


def _conversation(where: str, tokenizer: Any, messages: Messages) -> list[_Segment]:
    """The template's text, up to the last assistant turn: what comes before each such turn, and the turn."""
    segments, done = [], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(where, tokenizer, messages[:place], opened=True)
        after = _render(where, tokenizer, messages[: place + 1], opened=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{where}: the chat template writes what comes before message {place} differently once more messages follow, "
                "so no single text has every response after what the model will see before it; give one row per response, "
                "with data.prompt_key and data.response_key, or a template that only appends"
            )
        segments += [_Segment(before[len(done) :]), _Segment(after[len(before) :], learned=True)]
        done = after
    return segments


def _render(where: str, tokenizer: Any, messages: Messages, *, opened: bool) -> str:
    """The messages as text; opened: with the beginning of the assistant's next turn."""
    require_template(tokenizer)
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False))
    except Exception as error:  # whatever a template's code may raise
        raise DataError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from error


def _encode(rows: Sequence[_Row], tokenizer: Any, stop_ids: set[int], stop: int) -> Iterator[Demonstration]:
    segments = [segment for _, row in rows for segment in row]
    plain = iter(_tokenize(tokenizer, [s.text for s in segments if s.plain], special=True))
    templated = iter(_tokenize(tokenizer, [s.text for s in segments if not s.plain], special=False))
    for where, row in rows:
        ids: list[int] = []
        learned: list[int] = []
        for place, segment in enumerate(row, start=1):
            tokens = next(plain if segment.plain else templated)
            if segment.learned:
                end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)
                if end is None and place == len(row):
                    tokens = [*tokens, stop]
                learned += range(len(ids), len(ids) + (end or len(tokens)))
            ids += tokens
        if learned[0] == 0:
            raise DataError(f"{where}: the prompt has no tokens; generation needs at least one to start from")
        yield Demonstration(np.array(ids[: learned[-1] + 1], dtype=np.int64), np.array(learned, dtype=np.int64))


def _tokenize(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    return found
