from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncrl.config import ModelSpec
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.models.loading import adopt_weights, load_model, load_weights, named_weights

SMALL = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def tied_model(hidden: int = 16) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )


def test_tied_tensors_are_named_once_and_reach_both_ends() -> None:
    source, target = tied_model(), tied_model()
    weights = named_weights(source)
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights
    load_weights(target, weights)
    assert torch.equal(target.lm_head.weight, source.model.embed_tokens.weight)


def test_empty_tensors_and_views_of_one_memory_keep_their_names() -> None:
    model = torch.nn.Module()
    memory = torch.arange(4.0)
    model.register_buffer("none", torch.empty(0))
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("all", memory)
    model.register_buffer("part", memory[:2])
    model.register_buffer("again", memory)
    assert list(named_weights(model)) == ["none", "nothing", "all", "part"]


def test_weights_of_another_model_are_refused_by_name_and_shape() -> None:
    model = tied_model()
    with pytest.raises(CheckpointError, match="1 names differ"):
        load_weights(model, {k: v for k, v in named_weights(model).items() if k != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"\(8, 24\), this model has \(8, 16\)"):
        load_weights(model, named_weights(tied_model(hidden=24)))


def test_a_saved_folder_loads_and_a_missing_one_names_its_path(tmp_path: Path) -> None:
    model = tied_model()
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(ModelSpec(path=str(tmp_path / "m")))
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(named_weights(model).values(), named_weights(loaded).values(), strict=True))
    with pytest.raises(ConfigError, match="nowhere"):
        load_model(ModelSpec(path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (LlamaConfig(**SMALL), "sdpa"),
        (GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1), "eager"),  # refuses SDPA: it has sinks
        (Gemma2Config(**SMALL, attn_logit_softcapping=2.0), "eager"),  # SDPA would leave out the caps
        (Gemma2Config(**SMALL, attn_logit_softcapping=None), "sdpa"),
    ],
)
def test_attention_is_eager_where_sdpa_is_refused_or_another_model(
    tmp_path: Path, config: PreTrainedConfig, attention: str
) -> None:
    torch.manual_seed(0)
    truth = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    truth.save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(path=str(tmp_path)))
    assert loaded.config._attn_implementation == attention
    ids = torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, truth(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match=r"model\.path='.*' is no causal language model: .* tokens see those behind them"):
        load_model(ModelSpec(path=str(tmp_path)))


def test_adopted_weights_keep_their_dtypes_or_are_cast_but_for_what_stays_in_float32() -> None:
    source = tied_model().bfloat16()
    source.register_buffer("scale", torch.rand(3))
    source.register_buffer("steps", torch.arange(2))
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    for dtype in (None, torch.bfloat16, torch.float32):
        target = tied_model()
        target.register_buffer("scale", torch.zeros(3))
        target.register_buffer("steps", torch.zeros(2))
        target._keep_in_fp32_modules_strict = {"scale"}
        adopt_weights(target, before, dtype)
        found = named_weights(target)
        assert (found["scale"].dtype, found["steps"].dtype) == (torch.float32, torch.int64)
        assert {t.dtype for name, t in found.items() if "weight" in name} == {dtype or torch.bfloat16}
        assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in found.items())
        assert target.lm_head.weight is target.model.embed_tokens.weight
        found["model.norm.weight"].zero_()
        assert before["model.norm.weight"].any()  # copies
