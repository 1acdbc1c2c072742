"""What a decode step may look at: every layer of a model caches whole rows, and a mask is all that a window takes.

A cache as long as the row is more memory than a window needs, but rows then join, leave, move and are computed again alike
whatever the layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

_FIRST_SEEN: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "sliding_attention": lambda at, size: at - size + 1,  # the last `size` tokens
    "chunked_attention": lambda at, size: at - at % size,  # those since the last multiple of `size`
}
MASKED = {"full_attention", *_FIRST_SEEN}


def layer_kinds(text: PreTrainedConfig) -> set[str]:
    """The kinds of attention in the layers of a decoder, by transformers' names."""
    every = "sliding_attention" if _window(text) else "full_attention"
    return set(_read(text, "layer_types") or (every,))


def _window(text: PreTrainedConfig) -> int | None:
    size: int | None = _read(text, "sliding_window") or _read(text, "attention_chunk_size")
    return size


def _read(text: PreTrainedConfig, field: str) -> Any:
    """A field that the model reads: transformers keeps whatever else stands in a config.json, too."""
    kind = type(text)
    if kind.__module__.startswith("transformers.") and not hasattr(kind(), field):
        return None
    return getattr(text, field, None)


class DecodeMasks:
    """Makes the masks of sequences that go on, additive: SDPA would convert a bool mask in every layer."""

    def __init__(self, text: PreTrainedConfig, *, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._kinds, self._window, self._dtype = sorted(layer_kinds(text)), _window(text), dtype
        self._steps = torch.arange(max_length, device=device)

    def of(self, at: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """The masks [n, 1, T, length] of queries at positions [n, T], the largest length − 1: one, or one for each kind of
        layer, as the models that have several take them."""
        steps, at = self._steps[:length], at[:, :, None]
        hidden = steps > at
        full = torch.zeros(hidden.shape, dtype=self._dtype, device=at.device).masked_fill_(hidden, float("-inf"))
        masks = {}
        for kind in self._kinds:
            mask = full
            if kind in _FIRST_SEEN and self._window is not None and length > self._window:
                mask = full.masked_fill(steps < _FIRST_SEEN[kind](at, self._window), float("-inf"))
            masks[kind] = mask[:, None]
        return masks if len(masks) > 1 else masks[self._kinds[0]]
