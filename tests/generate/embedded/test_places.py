"""Rows in classes of lengths: whatever joins, grows and leaves, each row finds what it stored, densely packed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generate.embedded.places import Places

SLOTS, MAX_LENGTH = 6, 300
ACTIONS = st.lists(st.tuples(st.integers(0, 63), st.lists(st.integers(1, 40), min_size=SLOTS, max_size=SLOTS)), max_size=30)


class Store:
    """What lies at (class, slot): the name of a row."""

    def __init__(self) -> None:
        self.at: dict[tuple[int, int], int] = {}

    def copy(self, source: int, old: np.ndarray, kind: int, new: np.ndarray) -> None:
        assert source != kind or not set(old.tolist()) & set(new.tolist())
        self.at |= {(kind, n): self.at[source, o] for o, n in zip(old.tolist(), new.tolist(), strict=True)}


@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS, together=st.booleans())
def test_rows_are_found_again_however_they_move(actions: list[tuple[int, list[int]]], together: bool) -> None:
    """Each action has all rows grow, then ends those of a bit mask, as `Rows.drop` does; then slots are refilled."""
    places, store = Places(SLOTS, MAX_LENGTH, together=together), Store()
    names, lengths, fresh = [], [], 0
    for ending, growth in actions:
        while len(names) < SLOTS:
            names, lengths, fresh = [*names, fresh], [*lengths, 1 + 37 * fresh % 150], fresh + 1
            places.fit(np.array([len(names) - 1]), np.array(lengths[-1:]), store.copy)
            store.at[places.kind[len(names) - 1], places.slot[len(names) - 1]] = names[-1]
        lengths = [min(MAX_LENGTH, n + more) for n, more in zip(lengths, growth, strict=True)]
        places.fit(np.arange(SLOTS), np.array(lengths), store.copy)
        found = [store.at[place] for place in zip(places.kind[:SLOTS].tolist(), places.slot[:SLOTS].tolist(), strict=True)]
        assert found == names
        assert (places.capacities[places.kind[:SLOTS]] >= lengths).all()
        alive = [r for r in range(SLOTS) if not ending >> r & 1]
        to = [r for r in range(len(alive)) if r not in alive]
        source = [r for r in alive if r >= len(alive)]
        for hole, mover in zip(to, source, strict=True):
            names[hole], lengths[hole] = names[mover], lengths[mover]
        del names[len(alive) :], lengths[len(alive) :]
        places.drop(np.array(to, dtype=int), np.array(source, dtype=int), len(alive), store.copy)
        n = places.count
        for kind, size in enumerate(places.sizes):
            assert sorted(places.slot[:n][places.kind[:n] == kind]) == list(range(size))
        order = places.order()
        assert sorted(zip(places.kind[:n], places.slot[:n], strict=True)) == [(places.kind[r], places.slot[r]) for r in order]


def test_rows_of_one_class_lie_in_the_order_of_their_numbers() -> None:
    """So a batch of like lengths reads its rows as they are."""
    places, store = Places(8, 64, together=False), Store()
    store.at = {(0, slot): slot for slot in range(8)}
    places.fit(np.arange(8), np.full(8, 9), store.copy)
    places.drop(np.array([1, 4]), np.array([6, 7]), 6, store.copy)
    places.fit(np.array([6]), np.array([3]), store.copy)
    assert places.order().tolist() == list(range(7))


def test_a_row_takes_at_most_twice_its_length_alone_and_the_longest_ones_place_together() -> None:
    apart, together = (Places(4, 2048, together=of) for of in (False, True))
    assert apart.capacities.tolist() == [64, 128, 256, 512, 1024, 2048]
    lengths = np.array([1, 64, 65, 1900])
    assert apart.capacities[apart.needed(lengths)].tolist() == [64, 64, 128, 2048]
    assert together.capacities[together.needed(lengths)].tolist() == [2048] * 4
