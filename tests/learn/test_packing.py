import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learn.packing import split_into_packs
from asyncrl.models.packed import TokenSequence, make_pack


def plain(length: int) -> TokenSequence:
    """A sequence that needs `length` input tokens."""
    return TokenSequence(np.arange(length + 1), np.array([length]))


def test_by_hand_few_and_even() -> None:
    sequences = [plain(n) for n in (4, 1, 3, 2, 2)]  # 12 tokens, at most 7 a pack: two packs
    assert split_into_packs(sequences, range(5), 7) == [[1, 3, 4], [2, 0]]  # 1 + 2 + 2 and 3 + 4


def test_a_sequence_longer_than_the_bound_is_alone() -> None:
    assert split_into_packs([plain(3), plain(50), plain(3)], range(3), 8) == [[0, 2], [1]]


def test_nothing_to_pack() -> None:
    assert split_into_packs([], [], 8) == []


def test_rollouts_of_one_prompt_stay_together_and_its_prompt_counts_once() -> None:
    prompts = [np.full(9, 1), np.full(9, 2)]
    sequences = [TokenSequence(np.append(prompts[i % 2], [5, i]), np.array([9, 10]), 8) for i in range(6)]
    packs = split_into_packs(sequences, range(6), 14)  # a prompt's 8 shared tokens + 3 rollouts of 2 own tokens
    assert packs == [[0, 2, 4], [1, 3, 5]]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(5, 60))
def test_every_sequence_once_and_within_the_bound(lengths: list[int], bound: int) -> None:
    sequences = [plain(n) for n in lengths]
    packs = split_into_packs(sequences, range(len(lengths)), bound)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        tokens = len(make_pack(sequences, pack).input_ids_u)
        assert tokens <= max(bound, max(lengths[i] for i in pack) if len(pack) == 1 else 0)
