"""Tiny causal LMs of several architectures, with 32 tokens and random weights."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, tie_word_embeddings=True, **SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral, sliding window 5": lambda: MistralForCausalLM(MistralConfig(sliding_window=5, **SIZES)),
    "gpt2, tied": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "gemma2, by rows, soft caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(head_dim=8, final_logit_softcapping=0.01, sliding_window=64, attn_implementation="eager", **SIZES)
    ),
    # Its attention is not told of the window; packed, it would see the whole prompt.
    "qwen2_moe, by rows, sliding window 5": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(use_sliding_window=True, sliding_window=5, max_window_layers=2, **EXPERTS, **SIZES)
    ),
    # Positions turn slower in sequences of more than 8 tokens: next to one, a short one would be another.
    "phi3, by rows, positions that follow the length": lambda: Phi3ForCausalLM(
        Phi3Config(
            original_max_position_embeddings=8,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 8,
            },
            pad_token_id=0,
            **SIZES,
        )
    ),
    "gpt_oss, by rows, sinks": lambda: GptOssForCausalLM._from_config(
        GptOssConfig(head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2, **SIZES),
        attn_implementation="eager",
    ),
    "mamba, by rows": lambda: MambaForCausalLM(
        MambaConfig(
            vocab_size=32, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
        )
    ),
}


@pytest.fixture
def make() -> Callable[[str], PreTrainedModel]:
    """One of `MODELS` by name, the same weights every time."""

    def model(name: str) -> PreTrainedModel:
        torch.manual_seed(0)
        return MODELS[name]().eval()

    return model
