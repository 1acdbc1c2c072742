"""Keys and values of requests that have ended, kept for those that go on where they did: the next turn of an episode."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

LEAST = 64  # tokens; fewer are computed again in no time
Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values [kv_heads, T, head_dim]


class Prefix(NamedTuple):
    """What each layer computed of ids [T] int64."""

    group: int
    ids: np.ndarray
    layers: Layers


class Prefixes:
    """Of the weights in use alone: `clear` it when others come. Those that were not asked for longest go first."""

    def __init__(self, position_bytes: int) -> None:
        self._position_bytes = position_bytes
        self._kept: list[Prefix] = []  # in the order in which they were last used

    @property
    def bytes(self) -> int:
        return self._position_bytes * sum(len(prefix.ids) for prefix in self._kept)

    def find(self, group: int, ids: np.ndarray) -> tuple[int, Layers]:
        """With how many tokens of ids [T] something of the group begins, and what was computed of them; 0: not worth it."""
        size, best = max(((_shared(p.ids, ids), i) for i, p in enumerate(self._kept) if p.group == group), default=(0, 0))
        if size < LEAST:
            return 0, ()
        self._kept.append(found := self._kept.pop(best))
        return size, found.layers

    def keep(self, group: int, ids: np.ndarray, copy: Callable[[], Layers], room: float) -> None:
        """A copy of what was computed of ids [T], instead of any that it begins with, if that fits into `room` bytes."""
        self._kept = [p for p in self._kept if p.group != group or _shared(p.ids, ids) < len(p.ids)]
        left = room - len(ids) * self._position_bytes
        if len(ids) >= LEAST and left >= 0:
            self.shrink(left)
            self._kept.append(Prefix(group, ids, copy()))

    def shrink(self, room: float) -> None:
        """Forgets until there are so many bytes at the most."""
        while self._kept and self.bytes > room:
            self._kept.pop(0)

    def clear(self) -> None:
        self._kept.clear()


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """With how many equal tokens both begin."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
