import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import ShapingSpec
from asyncrl.reward.shaping import overlong, repetition, shape


@pytest.mark.parametrize(
    ("length", "expected"),
    # DAPO's own figures: 16,384 expected tokens, a buffer of 4,096, 20,480 at the most.
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (17408, -0.25), (18432, -0.5), (20480, -1.0), (30000, -1.0)],
)
def test_overlong_punishment_by_hand(length, expected):
    assert overlong(length, max_length=20480, buffer=4096) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "ngram", "expected"),
    [
        ([1, 2, 3], 1, 0.0),
        ([1, 1, 1, 1], 1, 0.75),
        ([1, 2, 1, 2, 1], 2, 0.5),  # 12 21 12 21: two distinct of four
        ([1, 2, 3, 1, 2, 3], 3, 0.25),  # 123 231 312 123
        ([1, 2], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repetition_by_hand(ids, ngram, expected):
    assert repetition(ids, ngram) == expected


def test_parts_add_up_and_are_named():
    spec = ShapingSpec(overlong_buffer=4, overlong_penalty=0.5, length_penalty=0.2, repetition_penalty=1.0, repetition_ngram=1)
    reward, parts = shape(1.0, [7] * 8, spec, max_length=10)
    # 2 of 4 buffer tokens used; 8 of 10 tokens; 7 of 8 tokens seen before
    assert parts == pytest.approx(
        {"unshaped": 1.0, "overlong_penalty": -0.25, "length_penalty": -0.16, "repetition_penalty": -0.875}
    )
    assert reward == pytest.approx(1.0 - 0.25 - 0.16 - 0.875)


def test_clipping_is_last():
    spec = ShapingSpec(length_penalty=2.0, clip=(-0.5, 0.25))
    assert shape(1.0, [1] * 10, spec, max_length=10) == (-0.5, {"unshaped": 1.0, "length_penalty": -2.0})
    assert shape(1.0, [], spec, max_length=10)[0] == 0.25


def test_without_a_setting_nothing_is_added():
    assert shape(0.7, [1] * 99, ShapingSpec(), max_length=10) == (0.7, {})


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5), st.integers(1, 20))
def test_penalties_are_bounded_and_never_shrink_with_length(ids, ngram, buffer):
    assert 0 <= repetition(ids, ngram) < 1
    shorter, longer = (overlong(length, max_length=25, buffer=buffer) for length in (len(ids), len(ids) + 1))
    assert -1 <= longer <= shorter <= 0
