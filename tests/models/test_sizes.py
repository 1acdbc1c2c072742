"""Sizes from a configuration, against the models that transformers makes of it, which here have no memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from asyncrl.models.sizes import size_of

SIZES = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
OPT = {"hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 3, "num_attention_heads": 8, "word_embed_proj_dim": 256}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
SMALL = {"n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 4000, "n_positions": 512}
MODELS = {
    "llama": SIZES,
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "qwen3": SIZES | {"head_dim": 64},
    "gemma2": SIZES | {"head_dim": 64},
    "gemma3_text": SIZES | {"head_dim": 32},
    "gpt2": SMALL,
    "gpt_neox": {name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
    "opt": OPT | {"vocab_size": 4000, "max_position_embeddings": 512},
    "phi3": SIZES,
    "starcoder2": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4},
    "qwen3_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 128},
    "qwen2_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 192},
    "deepseek_v3": SIZES
    | {"n_routed_experts": 4, "moe_intermediate_size": 128, "n_shared_experts": 2, "first_k_dense_replace": 1}
    | {"n_group": 1, "topk_group": 1}
    | LATENT,
}


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_of_architectures(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**MODELS[kind]))
    size = size_of(model.config.to_dict())
    assert size is not None
    assert size.parameters == pytest.approx(sum(parameter.numel() for parameter in model.parameters()), rel=0.01)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert size.output == (0 if output is embedding else output.numel())


def test_adapters_have_a_rank_for_each_side_of_each_matrix() -> None:
    size = size_of({"model_type": "llama", **SIZES})
    assert size is not None
    # q and o: 256 + 256 each; k and v: 256 + 128; three matrices of 256 + 640.
    assert size.widths == 3 * (2 * 512 + 2 * 384 + 3 * 896)


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba", **SIZES}, {"model_type": "llama", "hidden_size": 8}])
def test_what_can_not_be_counted_has_no_size(config: dict) -> None:
    assert size_of(config) is None
