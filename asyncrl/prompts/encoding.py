"""Prompts to token ids, with whatever tokenizer is handed in. Imports no tokenizer library itself."""

import hashlib
from collections.abc import Callable
from typing import Any

from asyncrl.errors import ConfigError
from asyncrl.prompts.reading import Text

Encode = Callable[[Text], list[int]]


def encoder(tokenizer: Any) -> Encode:
    """Chat messages go through the chat template, with the assistant's turn opened; strings are tokenized as they are.

    `tokenizer`: a Hugging Face tokenizer, or anything with its `apply_chat_template` and `encode`.
    Raises ConfigError for messages when the tokenizer has no chat template.
    """

    def encode(prompt: Text) -> list[int]:
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt))
        require_template(tokenizer)
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))

    return encode


def require_template(tokenizer: Any) -> None:
    """Raises ConfigError if there is no chat template to write messages with."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, but the data holds chat "
            "messages; give prompts as plain strings, or name a tokenizer with a template in model.tokenizer"
        )


def identity(tokenizer: Any) -> str:
    """A digest of vocabulary, rules and chat template: two tokenizers that share it encode alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = (type(tokenizer).__name__, rules, str(getattr(tokenizer, "chat_template", "")))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
