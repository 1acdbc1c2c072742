"""What is known of an architecture from its configuration alone: whether it is trained packed, and whether it is served here.

The names are those of `model_type`, as docs/architectures.py found them by trying tiny models; what no list names is trained by
rows, which is exact for every causal LM. No torch here: a dry run asks with a config.json, the engine and the learner with the
configuration of the model that they have.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncrl.errors import ConfigError
from asyncrl.models.hub import cached_file

REMEDY = "use deploy.generators.engine.kind=sglang, if SGLang serves it, or another model"
# Tokens see each other only through transformers' attention interface, which is told of every window; and logits are what
# models.logprobs.Head makes of the last hidden states.
_PACKED = """
    afmoe apertus arcee aria_text bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe
    exaone4 exaone_moe flex_olmo gemma gemma3 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3
    gpt2 gpt_neox granite granitemoe granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    jais2 jetmoe laguna llama longcat_flash mellum minimax_m2 ministral ministral3 mistral mixtral nanochat
    olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2
    youtu
"""
PACKED = frozenset(_PACKED.split())
_ENCODERS = """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm
    roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
_STATE = """
    bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 lfm2_moe mamba mamba2 minimax nemotron_h olmo_hybrid
    qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2
"""
_NOT_SERVED = {
    **dict.fromkeys(_ENCODERS.split(), "it was made as an encoder"),
    **dict.fromkeys(_STATE.split(), "it keeps a recurrent state, which rows that join and leave would mix"),
    **dict.fromkeys(("bloom", "ctrl", "gpt_neo", "mpt", "openai-gpt"), "its rows can't stand at different positions"),
    **dict.fromkeys(("deepseek_v32", "deepseek_v4", "glm_moe_dsa"), "an index of its own chooses what a token sees"),
}

# Of a configuration: vocab_size, num_hidden_layers, num_key_value_heads, head_dim, n_embd, num_experts, q_lora_rank, …
_SHAPES = re.compile(r"(^|_)(model_type|size|layers?|heads?|dim|embd|experts|rank)$")


def read_config(name: str, revision: str = "", file_name: str = "config.json") -> dict[str, Any]:
    """The config.json of a folder, or of a Hugging Face id from the cache here; empty where there is none. Asks no hub.

    Raises ConfigError if it is no JSON.
    """
    own = Path(name) / file_name
    file = own if own.is_file() else cached_file(name, file_name, revision)
    if file is None:
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}; fetch the model again") from error
    return config


def named(config: Mapping[str, Any]) -> str:
    """What the architecture is called in errors."""
    return ", ".join(config.get("architectures") or ()) or str(config.get("model_type", "unknown"))


def not_causal(config: Mapping[str, Any]) -> str:
    """Why the architecture is no causal language model, the only kind that is trained; empty if it is, or may be, one."""
    if config.get("is_encoder_decoder"):
        return "it is an encoder with a decoder"
    if config.get("model_type") in _ENCODERS.split() and not config.get("is_decoder"):
        return "it is an encoder: its tokens see those behind them"
    if _text(config).get("use_bidirectional_attention") in (True, "all"):
        return "its tokens see those behind them (use_bidirectional_attention)"
    if config.get("model_type") == "doge":
        return "with transformers' SDPA its tokens see those behind them"
    return ""


def not_a_classifier(config: Mapping[str, Any]) -> str:
    """Why the architecture is no sequence classifier with one label, and what to do; empty if it is, or may be, one."""
    kinds = config.get("architectures") or []
    labels = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    if kinds and not any("Classification" in kind or "Reward" in kind for kind in kinds):
        return f"is a {kinds[0]}: the head that scores would be random; name a model that was trained as a sequence classifier"
    if config and labels != 1:
        return f"has num_labels={labels}: which of them is the reward is not known; name one with a single label"
    return ""


def not_served(config: Mapping[str, Any]) -> str:
    """Why the embedded engine can't serve the architecture, and what to do; empty if it can, or nothing is known against it."""
    text = _text(config)
    why = _NOT_SERVED.get(text.get("model_type", ""), "")
    if not why and text.get("alibi"):
        why = "its rows can't stand at different positions (ALiBi)"
    if not why and follows_length(config):
        why = "its rotary positions depend on the longest row of the batch"
    return f"{why}; {REMEDY}" if why else not_causal(config)


def needs_eager(config: Mapping[str, Any]) -> bool:
    """Whether the model caps its attention scores, which transformers' SDPA leaves out."""
    return bool(_text(config).get("attn_logit_softcapping"))


def follows_length(config: Mapping[str, Any]) -> bool:
    """Whether rotary positions depend on how long the longest sequence of a forward pass is (dynamic NTK, LongRoPE)."""
    text = _text(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]  # one, or one for each kind of layer
    return any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope", "su") for kind in kinds)


def differing_shapes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two configurations say differently of kind and shapes: weights of one then fit no model of the other."""
    one, other = _text(one), _text(other)
    return sorted(
        f"{name}={one[name]!r}, not {other[name]!r}"
        for name in one.keys() & other.keys()
        if _SHAPES.search(name) and one[name] != other[name]
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about the language model."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return text
