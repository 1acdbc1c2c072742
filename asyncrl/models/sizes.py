"""How large a model is, from its configuration alone: what a config.json says, and no torch."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from asyncrl.models.architectures import PACKED

# By `model_type`: what configurations leave out that is as their class has it.
_TIED = """
    cohere cohere2 cohere2_moe ernie4_5 ernie4_5_moe gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text gpt-sw3 gpt2
    jetmoe opt smollm3 starcoder2 youtu
"""
# Their MLP has two matrices and not three.
_UNGATED = "apertus arcee gpt-sw3 gpt2 gpt_neox jais2 nanochat opt persimmon phi starcoder2"
# Their layers are what is counted here: all alike, or dense ones before those with experts, and none of them used repeatedly.
_COUNTED = (PACKED | {"gemma2", "gpt_oss", "qwen2_moe"}) - {"hrm_text", "jetmoe", "longcat_flash"}


class ModelSize(Struct, frozen=True, kw_only=True):
    """Parameters of a causal language model, and what a pass keeps of a token for the backward pass."""

    embedding: int  # parameters, those of learned positions included
    output: int  # of the output layer; 0 if that is the embedding
    inner: int  # of all layers
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    key_heads: int  # of keys and values
    packed: bool  # else it is trained by rows (models/architectures.py)
    splits: bool  # whether tp is sure to be able to divide it, but for its heads (models/sharding.py)
    widths: int  # Σ (inputs + outputs) of the layers' matrices: parameters of adapters of rank 1
    divided: int  # numbers between its matrices that a layer keeps of a token; tensor parallel ranks share them

    @property
    def parameters(self) -> int:
        return self.embedding + self.inner + self.output


def size_of(config: Mapping[str, Any]) -> ModelSize | None:
    """The size of the model that a config.json describes, within some percent; None where it is not known how to count."""
    text = _Fields(config.get("text_config") or config)
    kind, hidden, vocabulary = text.kind, text.number("hidden_size", "n_embd"), text.number("vocab_size")
    layers, heads = text.number("num_hidden_layers", "n_layer"), text.number("num_attention_heads", "n_head")
    if kind not in _COUNTED or not (hidden and vocabulary and layers and heads):
        return None
    key_heads = text.number("num_key_value_heads", default=heads)
    attention, between = _attention(text, hidden, heads, key_heads)
    mlp, mlp_widths, mlp_between, experts = _mlp(text, hidden, layers)
    embedding = vocabulary * hidden
    tied = text.fields.get("tie_word_embeddings", kind in _TIED.split())
    if kind in ("gpt2", "gpt-sw3", "opt"):
        embedding += text.number("n_positions", "max_position_embeddings") * hidden
    per_layer = text.number("vocab_size_per_layer_input") * text.number("hidden_size_per_layer_input")  # Gemma 3n and 4
    return ModelSize(
        embedding=embedding + per_layer * layers,
        output=0 if tied else vocabulary * hidden,
        inner=layers * (sum(a * b for a, b in attention) + 2 * hidden) + mlp,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        heads=heads,
        key_heads=key_heads,
        packed=kind in PACKED,
        splits=not experts and kind not in _UNGATED.split() and not text.number("kv_lora_rank"),
        widths=layers * sum(a + b for a, b in attention) + mlp_widths,
        divided=between + mlp_between // layers,
    )


class _Fields:
    """Numbers of a configuration, which architectures name differently."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields, self.kind = fields, fields.get("model_type")

    def number(self, *names: str, default: int = 0) -> int:
        """The first of these fields that is set; the largest, where each layer has its own."""
        value = next((self.fields[name] for name in names if self.fields.get(name) is not None), default)
        return max(value) if isinstance(value, list) else value


def _attention(text: _Fields, hidden: int, heads: int, key_heads: int) -> tuple[list[tuple[int, int]], int]:
    """A layer's matrices, inputs × outputs; and what it keeps of a token: queries, keys and values, before and after their
    norms and rotation, and what comes of them."""
    head = text.number("head_dim", default=hidden // heads)
    queries, keys = heads * head, key_heads * head
    matrices = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    if latent := text.number("kv_lora_rank"):  # DeepSeek: keys and values are made of few numbers
        rope, nope, value = (text.number(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        rank, queries = text.number("q_lora_rank"), heads * (nope + rope)
        keys = queries
        asked = [(hidden, rank), (rank, queries)] if rank else [(hidden, queries)]
        matrices = [*asked, (hidden, latent + rope), (latent, heads * (nope + value)), (heads * value, hidden)]
    return matrices, 5 * queries + 4 * keys


def _mlp(text: _Fields, hidden: int, layers: int) -> tuple[int, int, int, bool]:
    """Of all layers: parameters; Σ (inputs + outputs) of the matrices; what they keep of a token; whether there are experts."""
    matrices = 2 if text.kind in _UNGATED.split() else 3
    inner = text.number("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    experts = text.number("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    of_expert = text.number("moe_intermediate_size", default=inner)
    shared = text.number("shared_expert_intermediate_size", "shared_intermediate_size")
    shared += text.number("n_shared_experts", "num_shared_experts", "moe_num_shared_experts") * of_expert
    dense = layers if experts <= 1 else min(layers, text.number("first_k_dense_replace", "num_dense_layers"))
    routed, at_a_time = layers - dense, text.number("num_experts_per_tok", "moe_k", default=1)
    parameters = matrices * hidden * (dense * inner + routed * (experts * of_expert + shared)) + routed * experts * hidden
    widths = matrices * (dense * (hidden + inner) + routed * (experts * (hidden + of_expert) + hidden + shared))
    kept = (matrices + 1) * (dense * inner + routed * (shared + at_a_time * of_expert))
    return parameters, widths, kept, routed > 0
