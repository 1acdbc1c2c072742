"""A key/value cache of slots, behind Hugging Face's `Cache`: rows of one batch stand at different lengths.

    keys, values per layer: [slots, kv_heads, capacity, head_dim]; the token at position p of row r lies at [r, :, p].

The active rows are always 0 … count−1, so that one decode step reads a plain view of `count` rows up to the longest
length: no gather, no growing copy. Rows that end are filled from the back by `move`.
"""

import inspect
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from asyncrl.errors import ConfigError
from asyncrl.generate.embedded.masks import MASKED, layer_kinds
from asyncrl.models.architectures import REMEDY, needs_eager, not_served

ATTENTION = "asyncrl_slots"
FIRST_CAPACITY = 64  # positions per row; doubles as rows grow longer
_CACHED = (DynamicLayer, DynamicSlidingWindowLayer)  # transformers' caches that a SlotLayer can stand for


class _Plan:
    """Where the running forward pass writes: a prefill whole sequences, from position 0; a decode one token into each row."""

    prefill: bool = True
    rows: torch.Tensor  # [N] int64, the rows written
    sources: torch.Tensor  # [N] int64, prefill only: sequence sources[i] goes into row rows[i]
    positions: torch.Tensor  # [n] int64, decode only: where each row's token goes
    length: int = 0  # decode only: attention reads up to here
    level: bool = False  # decode only: all positions are length − 1


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values. Capacity follows the longest row so far, up to max_length: rows that lie close together
    are read faster (by a fifth, measured on CPU), and a generous max_length costs nothing until it is used."""

    is_sliding = False

    def __init__(self, plan: _Plan, slots: int, max_length: int) -> None:
        super().__init__()
        self._plan, self._slots, self._max_length = plan, slots, max_length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        empty = (self._slots, key_states.shape[1], 0)
        self.keys = key_states.new_zeros(*empty, key_states.shape[-1])
        self.values = value_states.new_zeros(*empty, value_states.shape[-1])
        self.is_initialized = True

    def _grow(self, length: int) -> None:
        """Makes room for `length` positions."""
        old = self.keys.shape[2]
        more = min(self._max_length, max(length, 2 * old, FIRST_CAPACITY)) - old
        # Zeros, because masked positions are multiplied by 0, and 0 × garbage may be NaN.
        self.keys, self.values = pad(self.keys, (0, 0, 0, more)), pad(self.values, (0, 0, 0, more))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new states [n, kv_heads, T, head_dim]; returns what attention may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._plan
        end = key_states.shape[2] if plan.prefill else plan.length
        if end > self.keys.shape[2]:
            self._grow(end)
        if plan.prefill:
            self.keys[plan.rows, :, :end] = key_states[plan.sources]
            self.values[plan.rows, :, :end] = value_states[plan.sources]
            return key_states, value_states
        count = key_states.shape[0]
        if plan.level:
            self.keys[:count, :, end - 1 : end] = key_states
            self.values[:count, :, end - 1 : end] = value_states
        else:
            self.keys[plan.rows, :, plan.positions] = key_states[:, :, 0]
            self.values[plan.rows, :, plan.positions] = value_states[:, :, 0]
        return self.keys[:count, :, :end], self.values[:count, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self._plan.prefill else self._plan.length), 0

    def get_seq_length(self) -> int:
        return 0 if self._plan.prefill else self._plan.length - 1

    def get_max_length(self) -> int:
        return self._max_length

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12


class SlotCache(Cache):
    """The layers, and the plan of the running forward pass. Not thread-safe: one forward at a time."""

    layers: list[SlotLayer]

    def __init__(self, *, layers: int, slots: int, max_length: int, device: torch.device) -> None:
        self._plan = _Plan()
        self._all_rows = torch.arange(slots, device=device)
        super().__init__(layers=[SlotLayer(self._plan, slots, max_length) for _ in range(layers)])

    def plan_prefill(self, rows: torch.Tensor, sources: torch.Tensor) -> None:
        """The next forward starts at position 0; its sequence sources[i] is stored in row rows[i] (both [N] int64)."""
        self._plan.prefill, self._plan.rows, self._plan.sources = True, rows, sources

    def plan_decode(self, positions: torch.Tensor, length: int, level: bool) -> None:
        """The next forward feeds one token to each of the first rows, at positions [n] int64, the largest length − 1;
        level: all of them there, which is cheaper to write."""
        self._plan.prefill, self._plan.rows = False, self._all_rows[: positions.shape[0]]
        self._plan.positions, self._plan.length, self._plan.level = positions, length, level

    def move(self, to: torch.Tensor, source: torch.Tensor, length: int) -> None:
        """Copies rows `source` over rows `to` (both [m] int64, disjoint), up to `length` positions."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[to, :, :length] = layer.keys[source, :, :length]
                layer.values[to, :, :length] = layer.values[source, :, :length]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA, except that a single query token per row never copies grouped keys: the query heads of a group become
    query positions instead. Hugging Face's SDPA repeats the whole cache per step as soon as there is a mask."""
    rows, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    if queries != 1 or heads == kv_heads or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


def require_servable(model: PreTrainedModel) -> None:
    """Raises ConfigError if the slot cache can't serve this model exactly, naming the architecture, why, and what can."""
    if problem := not_served(model.config.to_dict()) or _in_the_way(model):
        raise ConfigError(f"{type(model).__name__} can't be served by the torch engine: {problem}")


def _in_the_way(model: PreTrainedModel) -> str:
    """What a loaded model shows that its configuration alone does not; empty if nothing."""
    text = model.config.get_text_config(decoder=True)
    if getattr(model, "_is_stateful", False):
        return f"it keeps a state that is no key/value cache; {REMEDY}"
    if missing := {"position_ids", "past_key_values", "logits_to_keep"} - inspect.signature(model.forward).parameters.keys():
        return f"its forward takes no {sorted(missing)}, so its rows can't stand at different positions; {REMEDY}"
    kinds = layer_kinds(text) - MASKED
    kinds |= {type(layer).__name__ for layer in DynamicCache(config=text).layers if type(layer) not in _CACHED}
    if kinds:
        return f"it has layers of kind {sorted(kinds)}, whose state would be dropped or mixed; {REMEDY}"
    exact = ("eager",) if needs_eager(model.config.to_dict()) else ("sdpa", "eager", ATTENTION)
    if text._attn_implementation not in exact:
        return f"its attention {text._attn_implementation!r} would misread masks or leave out caps; load it with {exact[0]!r}"
    return ""


def longest_context(model: PreTrainedModel, max_length: int) -> int:
    """max_length, or less where the model knows fewer positions."""
    text = model.config.get_text_config(decoder=True)
    known = getattr(text, "max_position_embeddings", None) or max_length
    if getattr(text, "attn_temperature_tuning", False):  # from there on Llama 4 scales every row as the longest one
        known = min(known, text.floor_scale - 1)
    return min(max_length, known)


def use_slot_attention(model: PreTrainedModel) -> None:
    """Switches a model that runs SDPA to `slot_attention`, where its architecture lets attention be chosen."""
    AttentionInterface.register(ATTENTION, slot_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    sdpa = model.config.get_text_config(decoder=True)._attn_implementation == "sdpa"
    if sdpa and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(ATTENTION)
