"""Writes docs/architectures.md: what the learner and the embedded engine make of a tiny random model of each architecture.

python docs/architectures.py                 # tries all of them (a minute) and writes the page
python docs/architectures.py llama gemma2    # tries these, and prints their rows
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from asyncrl.errors import ConfigError
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.models.loading import named_weights, with_attention
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack
from asyncrl.types import GenerationRequest, Sampling, Version

PAGE = Path(__file__).with_name("architectures.md")
BOUND = 5e-6  # nats: the largest difference of a log-probability that counts as none, in float32
HEAD = f"""\
# Architectures

<!-- Written by `python docs/architectures.py`, which tries each on a tiny random model. Do not edit. -->

Any causal language model that transformers loads can be trained. Which engine serves it, and what the learner can save,
depends on its architecture. Each line of the table is a tiny random model of that `model_type` (as in its config.json),
compared token by token with a plain forward pass of each sequence alone, in float32. What is listed as working differs by
{BOUND:g} nats at most.

- **learner**. *packed*: sequences of any length in one row, shared prompts once. *by rows*: one forward pass for all
  sequences of a pack that are equally long; as exact, without padding, but slower, and a shared prompt is computed for each
  rollout.
- **embedded engine**. Tried with prompts and responses longer than the window, requests that join and leave, and weights
  swapped in flight. Layers with a sliding window, or chunks, cache whole rows and mask them. What it refuses, `--dry-run`
  refuses, too, and names what can be done: most often `deploy.generators.engine.kind=sglang`, where SGLang serves the
  architecture.

Attention runs through SDPA; eagerly where a model refuses that (GPT-OSS, for its sinks), or caps its scores (Gemma 2),
which SDPA would leave out. Some settings matter, too. With dynamic or LongRoPE positions (`rope_type`), and with ALiBi, the
embedded engine serves no model, and with the former a model trains by rows. Llama 4 is served up to the position from which
it scales its queries (`floor_scale`). Encoders and encoder-decoders are refused. What is not in the table trains by rows,
and is served if nothing in its configuration or code speaks against it.

| `model_type` | tried with | learner | embedded engine |
|---|---|---|---|
"""
WINDOW = 5  # tokens; every prompt is longer, or becomes so
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts"), 1),
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
INDEX = {"index_head_dim": 8, "index_n_heads": 2, "head_dim": 4, "num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_expand": 2}
DELTA = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")} | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
# What each needs beside SIZES and EXPERTS, of which it takes what its configuration knows; and what is tried of it.
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("", {}),
    "llama4_text": ("chunks", {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 48}),
    "qwen2": ("window in half the layers", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": WINDOW}),
    "qwen2_moe": (
        "window in half the layers",
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": WINDOW},
    ),
    "qwen3": ("window in half the layers", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": WINDOW}),
    "qwen3_moe": ("window", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3_next": ("", DELTA),
    "qwen3_5_text": ("", DELTA),
    "qwen3_5_moe_text": ("", DELTA),
    "phi": ("", {}),
    "phi3": ("window", {"sliding_window": WINDOW}),
    "phimoe": ("window", {"sliding_window": WINDOW}),
    "gpt2": ("", {}),
    "gpt_neo": ("window", {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW}),
    "gpt_neox": ("", {}),
    "gptj": ("", {"rotary_dim": 4}),
    "gpt_bigcode": ("", {}),
    "gpt_oss": ("window, sinks", MIXED),
    "codegen": ("", {"rotary_dim": 4}),
    "opt": ("", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "olmo": ("", {}),
    "olmo2": ("", {}),
    "olmo3": ("window in half the layers", MIXED),
    "olmoe": ("", {}),
    "olmo_hybrid": ("", DELTA),
    "flex_olmo": ("", {}),
    "smollm3": ("window in half the layers", {"use_sliding_window": True} | MIXED),
    "granite": ("", {"logits_scaling": 8.0}),
    "granitemoe": ("", {"logits_scaling": 8.0}),
    "granitemoeshared": ("", {"shared_intermediate_size": 16, "logits_scaling": 8.0}),
    "granitemoehybrid": ("", MAMBA | {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"] * 2}),
    "glm": ("", {}),
    "glm4": ("", {}),
    "glm4_moe": ("", {}),
    "glm4_moe_lite": ("", LATENT | {"head_dim": 4, "num_key_value_heads": 4}),
    "glm_moe_dsa": ("", LATENT | INDEX),
    "mistral": ("window", {"sliding_window": WINDOW}),
    "mixtral": ("window", {"sliding_window": WINDOW}),
    "ministral": ("window in half the layers", MIXED),
    "ministral3": ("window", {"sliding_window": WINDOW}),
    "starcoder2": ("window", {"sliding_window": WINDOW}),
    "gemma": ("", {}),
    "gemma2": (
        "window in half the layers, capped scores",
        MIXED | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3_text": ("window in half the layers", MIXED | {"query_pre_attn_scalar": 8}),
    "gemma3": (
        "text alone, window in half the layers",
        {
            "text_config": SIZES | MIXED | {"query_pre_attn_scalar": 8},
            "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        },
    ),
    "gemma3n_text": (
        "window in half the layers",
        MIXED
        | {"vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4}
        | {"activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4_text": (
        "window in half the layers",
        MIXED
        | {"vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "global_head_dim": 8},
    ),
    "vaultgemma": ("window in half the layers, capped scores", MIXED | {"query_pre_attn_scalar": 8}),
    "deepseek_v2": ("", LATENT | {"head_dim": 4, "num_key_value_heads": 4}),
    "deepseek_v3": ("", LATENT | {"num_key_value_heads": 4}),
    "deepseek_v32": ("", LATENT | INDEX),
    "bloom": ("", {}),
    "mpt": ("", {}),
    "falcon": ("", {}),
    "stablelm": ("", {}),
    "cohere": ("", {}),
    "cohere2": ("window in half the layers", MIXED),
    "cohere2_moe": ("window in half the layers", MIXED),
    "minimax": ("", {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 4}),
    "minimax_m2": ("", {"rotary_dim": 4}),
    "ernie4_5": ("", {}),
    "ernie4_5_moe": ("", {}),
    "exaone4": ("window in half the layers", MIXED),
    "exaone_moe": ("window in half the layers", MIXED),
    "hunyuan_v1_dense": ("", {}),
    "hunyuan_v1_moe": ("", {}),
    "hyperclovax": ("", {"logits_scaling": 0.5}),
    "hrm_text": ("", {}),
    "hy_v3": ("", {}),
    "seed_oss": ("", {}),
    "solar_open": ("", {}),
    "apertus": ("", {}),
    "arcee": ("", {}),
    "aria_text": ("", {}),
    "afmoe": ("window in half the layers", MIXED),
    "biogpt": ("", {}),
    "bitnet": ("", {}),
    "ctrl": ("", {"dff": 48}),
    "cwm": ("window in half the layers", MIXED),
    "diffllama": ("", {}),
    "dots1": ("window in half the layers", MIXED),
    "helium": ("", {}),
    "jais2": ("", {}),
    "jetmoe": ("", {"kv_channels": 8}),
    "laguna": ("window in half the layers", MIXED),
    "longcat_flash": ("", LATENT | {"ffn_hidden_size": 48, "zero_expert_num": 2, "head_dim": 4, "num_key_value_heads": 4}),
    "mellum": ("window in half the layers", MIXED),
    "modernbert-decoder": ("window in half the layers", MIXED | {"local_attention": 2 * WINDOW}),
    "nanochat": ("", {}),
    "nemotron": ("", {}),
    "openai-gpt": ("", {}),
    "persimmon": ("", {}),
    "xglm": ("", {"ffn_dim": 48}),
    "youtu": ("", LATENT | {"num_key_value_heads": 4}),
    "mamba": ("", {"state_size": 8}),
    "mamba2": ("", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("", {"state_size": 8}),
    "bamba": ("", MAMBA | {"attn_layer_indices": [1, 3]}),
    "falcon_h1": ("", MAMBA | {"mamba_d_ssm": 64}),
    "jamba": ("", {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "lfm2": ("", {"layer_types": ["conv", "full_attention"] * 2}),
    "lfm2_moe": ("", {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}),
    "nemotron_h": (
        "",
        {"hybrid_override_pattern": "M-*-", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    ),
    "recurrent_gemma": ("window", {"attention_window_size": WINDOW, "lru_width": 32}),
    "rwkv": ("", {"attention_hidden_size": 32}),
    "xlstm": ("", {"num_heads": 2, "num_blocks": 2, "chunk_size": 8}),
}


def tiny(model_type: str, seed: int, attn_implementation: str = "eager") -> PreTrainedModel:
    """A random model of four layers whose logits are lively: every token within reach moves them."""
    kind = CONFIG_MAPPING[model_type]
    known = kind.__dataclass_fields__.keys() | kind.attribute_map.keys()
    sizes = {name: size for name, size in (SIZES | EXPERTS).items() if name in known}
    config = kind(**sizes | TRIED[model_type][1])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif "sinks" in name:
                parameter.normal_()
    return model.eval()


@torch.no_grad()
def expected(model: PreTrainedModel, ids: np.ndarray, first: int) -> torch.Tensor:
    """Log-probabilities of the tokens from `first` on, by one plain forward pass of this sequence alone."""
    logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, first - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(ids[first:])[:, None])[:, 0]


@torch.no_grad()
def learner(model_type: str) -> tuple[str, float]:
    """How the learner scores sequences of unlike lengths that share prompts, and how far it is off."""
    rng, sequences = np.random.default_rng(0), []
    for _ in range(3):
        prompt = rng.integers(3, 32, 6)
        for length in rng.integers(1, 14, 3):
            ids = np.concatenate((prompt, rng.integers(3, 32, length)))
            sequences.append(TokenSequence(ids, np.arange(6, len(ids)), 5))
    plain = tiny(model_type, 0)
    model = PackedModel(with_attention(partial(tiny, model_type, 0)))
    packs = [make_pack(sequences, members) for members in ([8, 0, 3, 7, 1], [2, 4, 5, 6])]
    found = model.score(packs, torch.zeros(sum(len(sequence.scored) for sequence in sequences)))
    gap = (found - torch.cat([expected(plain, sequence.ids, 6) for sequence in sequences])).abs().max()
    return "packed" if model.flat else "by rows", float(gap)


def engine(model_type: str) -> float:
    """How far the engine's log-probabilities are off, over rows that join and leave, and two swaps in flight.

    Raises ConfigError if it refuses the model.
    """
    models = {Version(0, update): tiny(model_type, update) for update in range(3)}
    served = TorchEngine(with_attention(partial(tiny, model_type, 0)), slots=3, max_length=64)
    rng, sampling = np.random.default_rng(1), partial(Sampling, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=())
    requests = [
        GenerationRequest(
            id=str(i),
            group=i,
            prompt_ids=tuple(rng.integers(3, 32, 2 + 4 * i).tolist()),
            sampling=sampling(max_tokens=length),
            seed=i,
        )
        for i, length in enumerate((5, 8, 11, 5, 8))
    ]
    futures = served.submit_group(requests)
    for version, model in models.items():
        served.update_weights(version, named_weights(model))
        for _ in range(4):
            served.step()
    while served.step():
        pass
    gaps = []
    for request, answer in zip(requests, (future.result(0) for future in futures), strict=True):
        ids, first = np.array([*request.prompt_ids, *answer.token_ids]), len(request.prompt_ids)
        truth = {version: expected(model, ids, first) for version, model in models.items()}
        versions = [span.version for span in answer.spans for _ in range(span.length)]
        gaps += [abs(float(truth[version][i]) - answer.logprobs[i]) for i, version in enumerate(versions)]
    return max(gaps)


def row(model_type: str) -> str:
    """The line of the table."""
    how, gap = learner(model_type)
    trained = how if gap <= BOUND else f"**off by {gap:.0e}**"
    try:
        gap = engine(model_type)
        served = "yes" if gap <= BOUND else f"**off by {gap:.0e}**"
    except ConfigError as refusal:
        served = f"no: {str(refusal).partition('torch engine: ')[2].partition(';')[0]}"
    return f"| `{model_type}` | {TRIED[model_type][0]} | {trained} | {served} |"


def page() -> str:
    """The whole page as Markdown."""
    return HEAD + "\n".join(map(row, TRIED)) + f"\n\nTried with transformers {transformers.__version__}.\n"


def main(model_types: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    if model_types:
        print("\n".join(map(row, model_types)))
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
