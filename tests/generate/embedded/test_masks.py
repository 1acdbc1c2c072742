"""What a decode step may look at. That windows see what they see in a plain forward pass, test_engine.py shows."""

import torch
from transformers import Llama4TextConfig, LlamaConfig, MistralConfig

from asyncrl.generate.embedded.masks import DecodeMasks, layer_kinds


def seen(text, at: int) -> dict[str, list[int]]:
    """What the kinds of layers see from position `at`; at 9, for a model with one mask alone, under its kind."""
    made = DecodeMasks(text, max_length=16, dtype=torch.float32, device=torch.device("cpu")).of(torch.tensor([[at]]), at + 1)
    masks = made if isinstance(made, dict) else {next(iter(layer_kinds(text))): made}
    return {kind: (mask[0, 0, 0] == 0).nonzero()[:, 0].tolist() for kind, mask in masks.items()}


def test_a_window_is_the_last_tokens_and_a_chunk_those_since_its_start() -> None:
    assert seen(MistralConfig(sliding_window=4), 9) == {"sliding_attention": [6, 7, 8, 9]}
    chunks = Llama4TextConfig(attention_chunk_size=4, num_hidden_layers=4)
    assert seen(chunks, 9) == {"chunked_attention": [8, 9], "full_attention": list(range(10))}


def test_a_window_that_the_model_does_not_read_is_none() -> None:
    """Whatever else stands in a config.json, transformers keeps as an attribute."""
    stray = LlamaConfig(sliding_window=4, attention_chunk_size=4, layer_types=["sliding_attention"] * 32)
    assert seen(stray, 9) == {"full_attention": list(range(10))}
