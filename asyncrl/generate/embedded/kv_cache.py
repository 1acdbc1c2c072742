"""A key/value cache of slots, behind Hugging Face's `Cache`: rows of one batch stand at different lengths.

keys, values per layer and class of lengths: [slots, kv_heads, capacity, head_dim]; the token at position p of the row at
slot s lies at [s, :, p]. `Places` says which row lies where.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from asyncrl.errors import ConfigError
from asyncrl.generate.embedded.masks import MASKED, layer_kinds
from asyncrl.generate.embedded.places import Places
from asyncrl.generate.embedded.prefixes import Prefixes
from asyncrl.models.architectures import REMEDY, needs_eager, not_served

ATTENTION = "asyncrl_slots"
SPARE = 4 / 3  # slots, at most, for each row, where memory is short: an eighth more than rows, and those that just moved
_CACHED = (DynamicLayer, DynamicSlidingWindowLayer)  # transformers' caches that a SlotLayer can stand for


class _Class(NamedTuple):
    """The rows of one class in a decode step: from `start` to `stop` in the order in which they lie, at slots 0, 1, …"""

    kind: int
    start: int
    stop: int
    length: int  # attention reads up to here
    level: bool  # all rows are so long, which is cheaper to write
    slots: torch.Tensor  # [stop − start] int64
    positions: torch.Tensor  # [stop − start] int64: where each row's token goes


class _Whole(NamedTuple):
    """What a prefill stores in one class: its sequence sources[i] in slot slots[i] (both [N] int64), up to `end`."""

    kind: int
    slots: torch.Tensor
    sources: torch.Tensor
    end: int


class _Rest(NamedTuple):
    """Sequences that go on, each in a row of one class: they see what slots [n] hold up to `length`. Of their tokens are
    stored: those at [sources, :, times] go to [into, :, positions] (each [tokens] int64)."""

    kind: int
    slots: torch.Tensor
    length: int
    sources: torch.Tensor
    times: torch.Tensor
    into: torch.Tensor
    positions: torch.Tensor


class _Plan:
    """What the running forward pass stores and reads."""

    whole: Sequence[_Whole] = ()  # a prefill sees what is new
    rest: _Rest | None = None
    classes: Sequence[_Class] = ()  # a decode: one token into each row
    known: int = 0  # tokens of the longest row before this pass


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, by class. A class has slots for as many rows as it ever held, as far as memory reaches."""

    is_sliding = False

    def __init__(self, plan: _Plan, capacities: list[int]) -> None:
        super().__init__()
        self._plan, self._capacities = plan, capacities
        self.reached = False  # attention is given what `update` returned, as it is

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys: Any = [self._empty(key_states, capacity) for capacity in self._capacities]
        self.values: Any = [self._empty(value_states, capacity) for capacity in self._capacities]
        self.is_initialized = True

    @staticmethod
    def _empty(states: torch.Tensor, capacity: int) -> torch.Tensor:
        return states.new_zeros(0, states.shape[1], capacity, states.shape[-1])

    def resize(self, kind: int, slots: int) -> None:
        """Gives a class so many slots, the first of which stay as they are."""
        for of in (self.keys, self.values):
            # Zeros, because masked positions are multiplied by 0, and 0 × garbage may be NaN.
            new = of[kind].new_zeros(slots, *of[kind].shape[1:])
            kept = min(slots, len(of[kind]))
            new[:kept] = of[kind][:kept]
            of[kind] = new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new states [n, kv_heads, T, head_dim]; returns what attention may look at. That is no one tensor if rows
        are of several classes: then the keys carry `parts` for `slot_attention`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._plan
        if plan.rest is not None:
            return self._go_on(self.keys, key_states, plan.rest), self._go_on(self.values, value_states, plan.rest)
        for kind, slots, sources, end in plan.whole:
            self.keys[kind][slots, :, :end] = key_states[sources, :, :end]
            self.values[kind][slots, :, :end] = value_states[sources, :, :end]
        parts = [
            (self._put(self.keys[of.kind], key_states, of), self._put(self.values[of.kind], value_states, of))
            for of in plan.classes
        ]
        keys, values = parts[0] if len(parts) == 1 else (key_states, value_states)  # nothing to read but what is new
        keys.parts = parts if len(parts) > 1 else None  # type: ignore[attr-defined]
        keys.layer = self  # type: ignore[attr-defined]
        return keys, values

    @staticmethod
    def _go_on(caches: list[torch.Tensor], states: torch.Tensor, rest: _Rest) -> torch.Tensor:
        cache = caches[rest.kind]
        cache[rest.into, :, rest.positions] = states[rest.sources, :, rest.times]
        return cache[rest.slots, :, : rest.length]

    @staticmethod
    def _put(cache: torch.Tensor, states: torch.Tensor, of: _Class) -> torch.Tensor:
        if of.level:
            cache[: of.stop - of.start, :, of.length - 1 : of.length] = states[of.start : of.stop]
        else:
            cache[of.slots, :, of.positions] = states[of.start : of.stop, :, 0]
        return cache[: of.stop - of.start, :, : of.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._plan.known + query_length, 0

    def get_seq_length(self) -> int:
        return self._plan.known

    def get_max_length(self) -> int:
        return self._capacities[-1]

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12


class SlotCache(Cache):
    """The layers, where the rows lie in them, and the plan of the running forward pass. Not thread-safe.

    together: rows are never split into classes by their lengths.
    """

    layers: list[SlotLayer]

    def __init__(self, *, layers: int, slots: int, max_length: int, device: torch.device, together: bool) -> None:
        self._plan, self._device = _Plan(), device
        self.places = Places(slots, max_length, together=together)
        self.budget: float = math.inf  # bytes, beyond which slots without a row are given back
        self.order: np.ndarray | None = None  # of the rows as they lie, if that is another than by their numbers
        self.room = np.arange(0)  # positions that each row has
        self._all_slots = torch.arange(slots, device=device)
        self._slots = np.zeros_like(self.places.sizes)  # of each class
        self._reach = np.zeros_like(self.places.sizes)  # positions of each class that may hold something
        super().__init__(layers=[SlotLayer(self._plan, self.places.capacities.tolist()) for _ in range(layers)])

    def learn(self) -> None:
        """After a first prefill, which stored nothing: rows whose attention can't be split stay together."""
        self.used = [layer for layer in self.layers if layer.is_initialized]
        self.places.together |= not all(layer.reached for layer in self.used)
        tensors = [of[0] for layer in self.used for of in (layer.keys, layer.values)]
        self._position_bytes = sum(of.shape[1] * of.shape[3] * of.element_size() for of in tensors)
        self.prefixes = Prefixes(self._position_bytes)

    def bytes_for(self, lengths: np.ndarray) -> int:
        """What rows that grow so long take at the most."""
        positions = self.places.capacities[self.places.needed(lengths)].sum()
        return int(positions * self._position_bytes * SPARE)

    def _bytes_of(self, slots: np.ndarray) -> int:
        return int((slots * self.places.capacities).sum() * self._position_bytes)

    # ------------------------------------------------------------------------------------------- rows

    def fit(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Makes room for `rows`, which are to hold so many tokens; numbers from `places.count` on are new rows."""
        if self.places.fit(rows, lengths, self._copy):
            self._settle()

    def drop(self, to: np.ndarray, source: np.ndarray, left: int) -> None:
        """Only rows 0 … left−1 stay, after `source` took the numbers `to`."""
        self.places.drop(to, source, left, self._copy)
        self._settle()

    def _settle(self) -> None:
        places = self.places
        self._reach[places.sizes == 0] = 0
        self._reserve(places.sizes)
        self.room = places.capacities[places.kind[: places.count]]
        order = places.order()
        self.order = None if (order == np.arange(len(order))).all() else order

    def _reserve(self, rows: np.ndarray) -> None:
        """Gives each class slots for so many rows."""
        if (rows <= self._slots).all():
            return
        wanted, slots = rows + rows // 8, self._slots
        more = np.where(rows > slots, wanted, slots)
        if self._bytes_of(more) > self.budget:
            more = np.minimum(more, wanted)
        self.prefixes.shrink(self.budget - self._bytes_of(more))
        for kind in np.flatnonzero(more != slots).tolist():
            for layer in self.used:
                layer.resize(kind, int(more[kind]))
        self._slots = more

    def _copy(self, source: int, old: np.ndarray, kind: int, new: np.ndarray) -> None:
        if source != kind:
            rows = self.places.sizes.copy()
            rows[kind] = new[-1] + 1
            self._reserve(rows)
        at, to, end = self.tensor(old), self.tensor(new), int(self._reach[source])
        self._reach[kind] = max(self._reach[kind], end)
        for layer in self.used:
            for of in (layer.keys, layer.values):
                of[kind][to, :, :end] = of[source][at, :, :end]

    def keep(self, row: int, group: int, ids: np.ndarray) -> None:
        """Keeps what the row holds of ids [T] for prompts of the group that begin so, where slots leave room for it."""
        kind, slot = self.places.kind[row], self.places.slot[row]
        parts = ((of[kind][slot, :, : len(ids)] for of in (layer.keys, layer.values)) for layer in self.used)
        room = self.budget - self._bytes_of(self._slots)
        self.prefixes.keep(group, ids, lambda: [(keys.clone(), values.clone()) for keys, values in parts], room)

    def begin(self, row: int, group: int, ids: np.ndarray) -> int:
        """Puts into the row, for which there is room, what is kept of ids [T]: of how many, from the first on."""
        size, layers = self.prefixes.find(group, ids)
        kind, slot = self.places.kind[row], self.places.slot[row]
        for layer, (keys, values) in zip(self.used, layers, strict=False):
            layer.keys[kind][slot, :, :size] = keys[:, :size]
            layer.values[kind][slot, :, :size] = values[:, :size]
        self._reach[kind] = max(self._reach[kind], size)
        return size

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The array on the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    # ------------------------------------------------------------------------------------------ plans

    def plan_fill(self, rows: np.ndarray, sources: np.ndarray, length: int) -> None:
        """The next forward computes whole sequences, padded to `length`; sequence sources[i] goes into row rows[i]."""
        kinds, slots, plan = self.places.kind[rows], self.places.slot[rows], self._plan
        plan.whole, plan.rest, plan.classes, plan.known = [], None, (), 0
        for kind in np.unique(kinds).tolist():
            end, of = min(length, int(self.places.capacities[kind])), kinds == kind
            plan.whole.append(_Whole(kind, self.tensor(slots[of]), self.tensor(sources[of]), end))
            self._reach[kind] = max(self._reach[kind], end)

    def plan_rest(self, rows: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        """The next forward computes what follows in rows [n] of one class: sizes [n] tokens from positions starts [n] on."""
        plan, slots, length = self._plan, self.places.slot[rows], int((starts + sizes).max())
        of = np.repeat(np.arange(len(rows)), sizes)
        times = np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kind, tokens = int(self.places.kind[rows[0]]), map(self.tensor, (of, times, slots[of], starts[of] + times))
        plan.rest = _Rest(kind, self.tensor(slots), length, *tokens)
        plan.known = length - int(sizes.max())
        self._reach[kind] = max(self._reach[kind], length)

    def plan_decode(self, positions: np.ndarray, at: torch.Tensor) -> None:
        """The next forward feeds one token to each row, as they lie, at positions [n] int64, which `at` holds too."""
        classes, start = [], 0
        for kind, size in enumerate(self.places.sizes.tolist()):
            if size:
                stop, here = start + size, positions[start : start + size]
                length = int(here.max()) + 1
                level = int(here.min()) + 1 == length
                classes.append(_Class(kind, start, stop, length, level, self._all_slots[:size], at[start:stop]))
                self._reach[kind] = max(self._reach[kind], length)
                start = stop
        plan = self._plan
        plan.whole, plan.rest, plan.classes = (), None, classes
        plan.known = max(of.length for of in classes) - 1


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
    query positions instead. Hugging Face's SDPA repeats the whole cache per step as soon as there is a mask.

    Rows of several classes of lengths (`parts` of the keys) are attended class by class."""
    if (layer := getattr(key, "layer", None)) is not None:
        layer.reached = True
    if parts := getattr(key, "parts", None):
        assert attention_mask is not None, "rows of unlike lengths without a mask"
        split = [len(keys) for keys, _ in parts]
        each = zip(query.split(split), parts, attention_mask.split(split), strict=True)
        outs = [
            slot_attention(module, queries, keys, values, mask[..., : keys.shape[2]], scaling, **kwargs)[0]
            for queries, (keys, values), mask in each
        ]
        return torch.cat(outs), None
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
