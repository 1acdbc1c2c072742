"""Reward models: sequence classification with one label, asked as TRL asks them (`logits[:, 0]` of prompt and completion)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from asyncrl.config import ModelSpec
from asyncrl.errors import ConfigError


def load_classifier(spec: ModelSpec, device: str = "cpu") -> PreTrainedModel:
    """From a Hugging Face id or folder, in eval mode. Raises ConfigError if it is none with one label, or weights are missing:
    of a causal language model, the head that scores would be random."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            spec.path,
            dtype=getattr(torch, spec.dtype),
            trust_remote_code=spec.trust_remote_code,
            revision=spec.revision or "main",
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward model {spec.path!r}: no sequence classifier could be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"reward model {spec.path!r}: {len(missing)} weights, e.g. {missing[:3]}, are not in its files and would be "
            "random; name a model that was trained as a sequence classifier"
        )
    return model.to(device).eval()


def logits_of(model: PreTrainedModel, pad: int) -> Callable[[Sequence[list[int]]], list[float]]:
    """What scores sequences of token ids, padded on the right."""
    model.config.get_text_config().pad_token_id = pad  # by which it finds the last token of each

    @torch.inference_mode()
    def logits(sequences: Sequence[list[int]]) -> list[float]:
        longest = max(map(len, sequences))
        ids_bt = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences], device=model.device)
        lengths_b = torch.tensor([len(ids) for ids in sequences], device=model.device)
        mask_bt = torch.arange(longest, device=model.device) < lengths_b[:, None]
        found: list[float] = model(input_ids=ids_bt, attention_mask=mask_bt.long()).logits[:, 0].float().tolist()
        return found

    return logits


def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], list[int]]:
    """What tokenizes a text as it is, and messages by the chat template, which writes whatever special tokens there are.

    It raises ValueError for messages that the template refuses, or leaves out: a tool's answer that the model would not see.
    """

    def encode(chat: Any) -> list[int]:
        text = chat if isinstance(chat, str) else _written(tokenizer, chat)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode


def padding_of(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> int:
    """The padding token. Raises ConfigError if there is none."""
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"reward model {spec.path!r}: its tokenizer has no padding token, so conversations could not be scored together; "
            "save one with it (TRL sets pad_token = eos_token), or name a tokenizer that has one as the model's `tokenizer`"
        )
    pad: int = tokenizer.pad_token_id
    return pad


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"reward model {tokenizer.name_or_path!r}: its tokenizer has no chat template, and there are messages to score; "
            "save one with it, or name a tokenizer that has one as the model's `tokenizer`"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever the template, which is a program, says against them
        raise ValueError(f"the reward model's chat template refuses the conversation: {error}") from error
    for message in messages:
        content = message.get("content")
        if message.get("role") == "tool" and isinstance(content, str) and content.strip() not in text:
            raise ValueError(f"the reward model's chat template leaves out what a tool said: {content[:100]!r}")
    return text
