"""The slot cache equals Hugging Face's own, and refuses what it can't serve."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from asyncrl.errors import ConfigError
from asyncrl.generate.embedded.batch import Decoder
from asyncrl.generate.embedded.kv_cache import longest_context, require_servable

MakeModel = Callable[..., PreTrainedModel]
SMALL = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


FALCON = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def plain_logits(model: PreTrainedModel, tokens: np.ndarray) -> torch.Tensor:
    """Logits after the last token, by one forward without cache."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None]).logits[0, -1]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_rows_of_different_lengths_decode_as_alone(make_model: MakeModel, kind: str) -> None:
    """Grouped heads, and an architecture with learned positions and as many key as query heads."""
    gpt2 = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    model = GPT2LMHeadModel(gpt2).eval() if kind == "gpt2" else make_model(kind)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 24, size=n) for n in (2, 5, 9, 1)]
    expected = [plain_logits(model, text) for text in texts]
    decoder = Decoder(model, slots=6, max_length=32)
    with torch.inference_mode():
        computed = decoder.fill([text[:-1] for text in texts], [[0], [1], [2], [3]])
        logits = decoder.decode(np.array([t[-1] for t in texts]), np.array([len(t) - 1 for t in texts]))
    assert computed == 1 + 4 + 8 + 0
    torch.testing.assert_close(logits, torch.stack(expected), atol=2e-5, rtol=0)


def test_one_prefill_serves_many_rows_and_rows_move(make_model: MakeModel) -> None:
    model = make_model()
    prompt, other = np.array([3, 1, 4, 1, 5]), np.array([2, 7, 1])
    decoder = Decoder(model, slots=4, max_length=16)
    with torch.inference_mode():
        assert decoder.fill([prompt[:-1], other[:-1]], [[1, 3], [0, 2]]) == 4 + 2
        decoder.cache.drop(np.array([0]), np.array([3]), 3)  # row 3 takes the place of row 0
        logits = decoder.decode(np.array([5, 5, 1]), np.array([4, 4, 2]))
    expected = torch.stack([plain_logits(model, text) for text in (prompt, prompt, other)])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def attended(decoder: Decoder) -> int:
    """Positions that the last step's attention read, over all rows."""
    return sum((of.stop - of.start) * of.length for of in decoder.cache._plan.classes)


def nbytes(decoder: Decoder) -> int:
    return sum(of.nbytes for layer in decoder.cache.used for of in (*layer.keys, *layer.values))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3, every other layer sees 5"])
def test_a_long_row_costs_short_ones_neither_time_nor_memory(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind, max_position_embeddings=1024)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 24, size=n) for n in (900, *range(40, 55), 130)]
    decoder = Decoder(model, slots=17, max_length=1024)
    with torch.inference_mode():
        decoder.fill([text[:-1] for text in texts], [[row] for row in range(17)])
        logits = decoder.decode(np.array([t[-1] for t in texts]), np.array([len(t) - 1 for t in texts]))
    torch.testing.assert_close(logits, torch.stack([plain_logits(model, text) for text in texts]), atol=2e-5, rtol=0)
    used = sum(map(len, texts))
    assert attended(decoder) == 900 + 15 * 54 + 130 < 1.1 * used  # not 17 × 900
    assert nbytes(decoder) == decoder.cache._position_bytes * (1024 + (15 + 1) * 64 + 256)
    assert nbytes(decoder) < 2 * used * decoder.cache._position_bytes


def test_attention_that_cannot_be_split_reads_all_rows_up_to_the_longest(make_model: MakeModel) -> None:
    """Eager attention, as Gemma 2 needs it, takes one tensor."""
    model = make_model("gemma2, eager, capped scores")
    decoder, texts = Decoder(model, slots=2, max_length=96), [np.arange(80) % 24, np.arange(9)]
    assert decoder.cache.places.together
    with torch.inference_mode():
        decoder.fill([text[:-1] for text in texts], [[0], [1]])
        logits = decoder.decode(np.array([t[-1] for t in texts]), np.array([79, 8]))
    assert attended(decoder) == 2 * 80
    torch.testing.assert_close(logits, torch.stack([plain_logits(model, text) for text in texts]), atol=2e-5, rtol=0)


def test_sequences_go_on_where_the_cache_ends(make_model: MakeModel) -> None:
    """As if computed in one piece: rows of several classes, that go on by unlike numbers of tokens, one of them by none."""
    model = make_model()
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 24, size=n) for n in (90, 30, 70, 12)]
    known = np.array([40, 20, 69, 11])
    decoder = Decoder(model, slots=4, max_length=96)
    with torch.inference_mode():
        decoder.cache.fit(np.arange(4), np.array([len(text) for text in texts]))
        decoder.fill([text[:n] for text, n in zip(texts, known, strict=True)], [[0], [1], [2], [3]])
        rest = [text[n:-1] for text, n in zip(texts, known, strict=True)]
        assert decoder.fill(rest, [[0], [1], [2], [3]], known) == 49 + 9
        logits = decoder.decode(np.array([t[-1] for t in texts]), np.array([len(t) - 1 for t in texts]))
    torch.testing.assert_close(logits, torch.stack([plain_logits(model, text) for text in texts]), atol=2e-5, rtol=0)


def test_long_and_short_prompts_are_filled_in_separate_forwards(make_model: MakeModel) -> None:
    """Padding a short prompt to more than twice its length would cost more than a second forward."""
    decoder = Decoder(make_model(), slots=4, max_length=64)
    widths: list[tuple[int, ...]] = []
    decoder.model.register_forward_pre_hook(lambda m, a, kw: widths.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    with torch.inference_mode():
        decoder.fill([np.ones(n, dtype=np.int64) for n in (3, 40, 30, 4)], [[0], [1], [2], [3]])
    assert widths == [(2, 40), (2, 4)]


def test_masked_single_token_attention_equals_sdpa(make_model: MakeModel) -> None:
    """The grouped path, reached by a plain cached forward with a 4D mask, against the model's own SDPA."""
    ours, theirs = make_model(), make_model()
    Decoder(ours, slots=1, max_length=8)  # switches the attention
    assert ours.config._attn_implementation != theirs.config._attn_implementation
    ids, mask = torch.tensor([[4]]), torch.zeros(1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
            ),
            "rotary positions depend on the longest row",
        ),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=24, hidden_size=32, n_layer=1, n_head=4)), "different positions"),
        (lambda: FalconForCausalLM(FalconConfig(**FALCON, alibi=True)), "different positions"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=1)), "recurrent state"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SMALL, layer_types=["full_attention", "conv"])),
            "layers of kind .*LinearAttention",
        ),
        (lambda: LlamaForCausalLM._from_config(LlamaConfig(**SMALL), attn_implementation="flex_attention"), "'flex_attention'"),
        pytest.param(
            lambda: Gemma2ForCausalLM._from_config(Gemma2Config(**SMALL), attn_implementation="sdpa"),
            "'sdpa'.* with 'eager'",
            marks=pytest.mark.skipif(not Gemma2ForCausalLM._supports_sdpa, reason="transformers refuses it itself since 5.23"),
        ),
    ],
)
def test_models_that_it_would_serve_wrongly_are_refused(model: Callable[[], PreTrainedModel], word: str) -> None:
    with pytest.raises(ConfigError, match=f"ForCausalLM can't be served by the torch engine: .*{word}"):
        require_servable(model())


def test_context_is_cut_to_the_models_positions(make_model: MakeModel) -> None:
    assert longest_context(make_model(), 2048) == 96
    assert longest_context(make_model(), 50) == 50
    llama4 = "llama4, every other layer sees its chunk of 5"
    assert longest_context(make_model(llama4, floor_scale=32), 50) == 31  # the scale of queries is 1 up to there
    assert longest_context(make_model(llama4, floor_scale=32, attn_temperature_tuning=False), 50) == 50
