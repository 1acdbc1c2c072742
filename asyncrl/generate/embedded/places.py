"""Where each row of the batch lies: in the class of its length, at a slot there. Pure: a callback does the copying.

A class holds rows of one capacity: 64 positions, 128, … up to max_length. A step reads each class only up to its longest row,
so that a long row costs short ones neither time nor memory; one that outgrows its class is copied into the next.
"""

from collections.abc import Callable

import numpy as np

FIRST_CAPACITY = 64  # positions of a row in the first class; in each later one twice as many
# (class and slots from, class and slots to): the slots are disjoint.
Copy = Callable[[int, np.ndarray, int, np.ndarray], None]


class Places:
    """Class and slot of rows 0 … count−1. The rows of a class lie at its slots 0 … size−1: a plain view, no gather.

    together: all rows lie in the class that the longest needs.
    """

    def __init__(self, slots: int, max_length: int, *, together: bool) -> None:
        smaller = [FIRST_CAPACITY << i for i in range(max_length.bit_length()) if FIRST_CAPACITY << i < max_length]
        self.capacities = np.array([*smaller, max_length])
        self.together = together
        self.count = 0
        self.kind = np.zeros(slots, dtype=np.int64)  # each row's class
        self.slot = np.zeros(slots, dtype=np.int64)
        self.sizes = np.zeros(len(self.capacities), dtype=np.int64)  # rows in each class

    def needed(self, lengths: np.ndarray) -> np.ndarray:
        """The classes of rows that are as long."""
        kinds = np.searchsorted(self.capacities[:-1], lengths)
        return np.full_like(kinds, kinds.max(initial=0)) if self.together else kinds

    def fit(self, rows: np.ndarray, lengths: np.ndarray, copy: Copy) -> bool:
        """`rows` are so long now: places those that are new, moves those that outgrew their class. False if nothing changes."""
        old, self.count = self.count, max(self.count, int(rows.max()) + 1)
        self.kind[old : self.count] = -1
        need = np.full(self.count, -1)
        need[rows] = self.needed(lengths)
        if self.together:
            need[:] = max(need.max(), self.kind[: self.count].max())
        moving = np.flatnonzero(need > self.kind[: self.count])
        if len(moving) == 0:
            return False
        sources, need = self.kind[moving], need[moving]
        for source, kind in np.unique(np.stack([sources, need]), axis=1).T.tolist():
            these = moving[(sources == source) & (need == kind)]
            slots = self.sizes[kind] + np.arange(len(these))
            if source >= 0:
                copy(source, self.slot[these], kind, slots)
            self.kind[these], self.slot[these] = kind, slots
            self.sizes[kind] += len(these)
        self._close_up(copy)
        return True

    def drop(self, to: np.ndarray, source: np.ndarray, left: int, copy: Copy) -> None:
        """Rows `source` are called `to` now, whose rows have gone, and only rows 0 … left−1 stay."""
        self.kind[to], self.slot[to] = self.kind[source], self.slot[source]
        self.count = left
        self._close_up(copy)

    def _close_up(self, copy: Copy) -> None:
        """Rows from the back of their class fill the slots that others left."""
        for kind in range(len(self.sizes)):
            rows = np.flatnonzero(self.kind[: self.count] == kind)
            late = rows[self.slot[rows] >= len(rows)]
            if len(late):
                free = np.setdiff1d(np.arange(len(rows)), self.slot[rows])
                copy(kind, self.slot[late], kind, free)
                self.slot[late] = free
            self.sizes[kind] = len(rows)

    def order(self) -> np.ndarray:
        """The rows as they lie: class by class, slot by slot."""
        return np.lexsort((self.slot[: self.count], self.kind[: self.count]))
