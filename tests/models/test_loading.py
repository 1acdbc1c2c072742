import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from asyncrl.config import ModelSpec
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.models.configuring import load_config
from asyncrl.models.loading import (
    adopt_weights,
    context,
    empty_model,
    load_model,
    load_weights,
    named_weights,
    verify_export,
)
from asyncrl.models.memory import FlatTensors
from asyncrl.models.tokenizing import stop_token_ids

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


def mapped() -> int:
    """How many versions from the bus this process uses."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("asyncrl-weights")


def test_a_version_from_the_bus_is_used_where_it_lies_and_goes_with_its_last_user() -> None:
    source, target, before = tied_model(), tied_model(), mapped()
    for _ in range(3):
        version = FlatTensors.copy_of(named_weights(source), "weights")
        load_weights(target, version)
        assert {name: tensor.data_ptr() for name, tensor in version.items()} == addresses(target)
        assert target.lm_head.weight.data_ptr() == version["model.embed_tokens.weight"].data_ptr()
        del version
        assert mapped() == before + 1
    assert all(torch.equal(tensor, named_weights(source)[name]) for name, tensor in named_weights(target).items())
    del target
    assert mapped() == before


def test_what_may_change_or_is_of_another_dtype_is_copied() -> None:
    source, target, served = tied_model(), tied_model(), tied_model().to(torch.bfloat16)
    for model, weights in (
        (target, named_weights(source)),
        (served, FlatTensors.copy_of(named_weights(source), "weights")),
    ):
        own = addresses(model)
        load_weights(model, weights)
        assert addresses(model) == own
    assert torch.equal(served.lm_head.weight, source.lm_head.weight.to(torch.bfloat16))


def addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in named_weights(model).items()}


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
        # transformers 5.23 has given up SDPA for all of Gemma 2
        (Gemma2Config(**SMALL, attn_logit_softcapping=None), "sdpa" if Gemma2ForCausalLM._supports_sdpa else "eager"),
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


# ------------------------------------------------------------------------------------------ what a recipe says of a model


def test_fields_of_the_configuration_are_changed_also_nested_and_by_their_other_names(tmp_path: Path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(tmp_path / "qwen3")
    changed = {"attention_dropout": 0.25, "rope_parameters": {"rope_theta": 5e5}, "eos_token_id": [3, 5]}
    spec = ModelSpec(path=str(tmp_path / "qwen3"), override_config=changed)
    model, plain = load_model(spec), load_model(ModelSpec(path=spec.path))
    assert (model.config.attention_dropout, plain.config.attention_dropout) == (0.25, 0.0)
    assert model.config.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    assert not torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert stop_token_ids(SimpleNamespace(eos_token_id=7), spec) == (3, 5, 7)
    assert context(ModelSpec(path=spec.path, override_config={"max_position_embeddings": 99})) == (8, 99)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    model.config.save_pretrained(tmp_path / "saved")  # as a checkpoint has it
    assert empty_model(ModelSpec(path=str(tmp_path / "saved"))).config.attention_dropout == 0.25

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    text = Gemma3TextConfig(**SMALL)
    both = Gemma3Config(text_config=text)
    both.save_pretrained(tmp_path / "gemma3")
    named = ModelSpec(path=str(tmp_path / "gpt2"), override_config={"max_position_embeddings": 16})
    assert load_config(named).n_positions == 16
    nested = ModelSpec(path=str(tmp_path / "gemma3"), override_config={"text_config": {"sliding_window": 7}})
    assert load_config(nested).text_config.sliding_window == 7
    assert load_config(nested).text_config.hidden_size == 16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"attention_droput": 0.1},
            r"Qwen3Config has no field 'attention_droput'.*'attention_dropout'",
        ),
        ({"attention_dropout": "much"}, r"override_config\.attention_dropout='much' is refused by Qwen3Config"),
        ({"dtype": "bfloat16"}, "that is model.dtype"),
        ({"to_dict": 1}, "has no field 'to_dict'"),
        ({"hidden_size": 32}, "no causal LM could be loaded"),
        ({"num_hidden_layers": 3}, "no causal LM could be loaded: list index"),
        (
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            r"\d+ weights, e\.g\. \['model\.layers\.2\..* are not in its files and would be random",
        ),
    ],
)
def test_changes_that_the_configuration_or_the_weights_do_not_know_are_refused(
    tmp_path: Path, changed: dict, said: str
) -> None:
    Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        load_model(ModelSpec(path=str(tmp_path), override_config=changed))


def test_a_classifier_is_no_language_model_with_a_random_head(tmp_path: Path) -> None:
    Qwen3ForSequenceClassification(Qwen3Config(**SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"1 weights, e\.g\. \['lm_head\.weight'\], are not in its files"):
        load_model(ModelSpec(path=str(tmp_path)))


BUILDER = """
import torch
from transformers import AutoModelForCausalLM

def make(spec):
    model = AutoModelForCausalLM.from_pretrained(spec.path, dtype=getattr(torch, spec.dtype))
    model.lm_head.register_parameter("bias", torch.nn.Parameter(torch.full((8,), 0.5, dtype=model.dtype)))
    return model

def wrong(spec):
    return make(spec).half()

def nothing(spec):
    return spec

def broken(spec):
    raise KeyError("weights")
"""


def test_a_builder_makes_the_model_wherever_it_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BUILDER)
    Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path / "m")
    spec = ModelSpec(path=str(tmp_path / "m"), builder=f"{file}:make", dtype="bfloat16")
    for model in (load_model(spec), empty_model(spec)):
        assert not model.training
        assert model.dtype == torch.bfloat16
        assert torch.equal(named_weights(model)["lm_head.bias"], torch.full((8,), 0.5, dtype=torch.bfloat16))
    for name, said in (
        ("wrong", "returned a model in torch.float16"),
        ("nothing", "returned a ModelSpec"),
        ("broken", r"failed: KeyError: 'weights' \(.*mine\.py"),
    ):
        with pytest.raises(ConfigError, match=rf"critic\.builder='.*{name}' {said}"):
            load_model(replace(spec, builder=f"{file}:{name}"), field="critic")
    with pytest.raises(ConfigError, match="with a builder, which makes its own configuration"):
        ModelSpec(path="m", builder="a:b", override_config={"x": 1})


def test_what_was_written_and_can_not_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match="can't be loaded by transformers, and was given up"):
        verify_export(tmp_path, {}, trust_remote_code=False)
