"""Hugging Face tokenizers, and the tokens that end a response. Needs no torch, unlike whatever loads a model."""

import os
import sys
from typing import TYPE_CHECKING

from asyncrl.config import ModelSpec
from asyncrl.errors import ConfigError
from asyncrl.models.configuring import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_only(spec: ModelSpec) -> None:
    """Lets this process do without torch, which transformers would import though it only tokenizes: 3 s and 250 MB.

    Call it only in a process that computes nothing, before transformers is imported. Code that comes with a tokenizer may need
    torch, and keeps it; so does a process that has imported it already.
    """
    if spec.trust_remote_code or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python is told that a module can't be imported
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing


def load_tokenizer(spec: ModelSpec) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, or the one named by `spec.tokenizer`."""
    from transformers import AutoTokenizer

    path, revision = (spec.tokenizer, spec.tokenizer_revision) if spec.tokenizer else (spec.path, spec.revision)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=spec.trust_remote_code, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer={path!r}: no tokenizer could be loaded: {error}") from error


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase", spec: ModelSpec) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end of sequence and those of the model's generation settings, rising."""
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(spec.path, revision=spec.revision or "main")
    except OSError:  # many models have no such file; the configuration says it then
        settings = load_config(spec)
    of_model = spec.override_config.get("eos_token_id", getattr(settings, "eos_token_id", None))
    ids = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return tuple(sorted(token for token in ids if token is not None))
