from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.errors import ConfigError
from asyncrl.staleness import Staleness


@pytest.mark.parametrize(
    ("max_lag", "batch", "untaken", "committed", "update", "room"),
    [
        (0, 4, 0, 0, 0, 4),  # synchronous: one batch, no more
        (0, 4, 4, 0, 0, 0),
        (0, 4, 4, 0, 1, 4),  # new weights arrive before the commit is counted
        (0, 4, 0, 1, 0, 0),  # weights one behind: too old
        (1, 4, 0, 5, 5, 8),
        (1, 4, 3, 5, 4, 1),  # one behind: room for one batch, three taken
        (4, 2, 0, 3, 3, 10),
        (4, 2, 9, 3, 3, 1),
        (4, 2, 0, 9, 3, -2),  # six behind a bound of four
    ],
)
def test_room(max_lag: int, batch: int, untaken: int, committed: int, update: int, room: int) -> None:
    rule = Staleness(max_lag=max_lag, batch_groups=batch)
    assert rule.room(untaken=untaken, committed=committed, update=update) == room


@given(
    max_lag=st.integers(0, 8),
    batch=st.integers(1, 9),
    committed=st.integers(0, 20),
    behind=st.integers(0, 9),
    k=st.integers(1, 50),
)
def test_what_is_admitted_can_be_trained_in_time(max_lag: int, batch: int, committed: int, behind: int, k: int) -> None:
    rule, update = Staleness(max_lag=max_lag, batch_groups=batch), committed - behind
    untaken = rule.room(untaken=0, committed=committed, update=update) - k  # so that the k-th just fits
    if untaken < 0:
        return
    assert rule.room(untaken=untaken, committed=committed, update=update) == k
    deadlines = [rule.deadline(update)] * (untaken + k)
    assert rule.feasible(deadlines, committed)
    assert not rule.feasible([*deadlines, rule.deadline(update)], committed)  # the bound is tight: one more would break it


DEADLINES = st.lists(st.one_of(st.integers(-1, 5), st.just(float("inf"))), max_size=7)


@given(deadlines=DEADLINES, batch=st.integers(1, 3), committed=st.integers(0, 3))
def test_feasible_is_what_counting_says(deadlines: list[float], batch: int, committed: int) -> None:
    """I(c): none is overdue, and for every j >= 0 at most (j + 1)·B have a deadline <= c + j."""
    counted = all(sum(d <= committed + j for d in deadlines) <= (j + 1) * batch for j in range(8))
    expected = counted and all(d >= committed for d in deadlines)
    assert Staleness(max_lag=4, batch_groups=batch).feasible(deadlines, committed) == expected


@given(deadlines=DEADLINES, batch=st.integers(1, 3), committed=st.integers(0, 3))
def test_as_few_as_possible_do_not_fit(deadlines: list[float], batch: int, committed: int) -> None:
    rule = Staleness(max_lag=4, batch_groups=batch)
    misfits = set(rule.misfits(enumerate(deadlines), committed))
    assert rule.feasible([d for i, d in enumerate(deadlines) if i not in misfits], committed)
    largest = max(
        size
        for size in range(len(deadlines) + 1)
        for chosen in combinations(deadlines, size)
        if rule.feasible(chosen, committed)
    )
    assert len(deadlines) - len(misfits) == largest


def test_misfits_spares_what_comes_first() -> None:
    rule = Staleness(max_lag=4, batch_groups=1)
    assert rule.misfits([(7, 0), (8, 0), (9, 5)], committed=0) == [8]
    assert rule.misfits([(8, 0), (7, 0), (9, 5)], committed=0) == [7]


def test_trainable_tokens_are_neither_too_old_nor_from_the_future() -> None:
    rule = Staleness(max_lag=2, batch_groups=1)
    updates = np.array([3, 4, 5, 6, 7])
    assert rule.trainable(updates, committed=6).tolist() == [False, True, True, True, False]


def test_overdue_is_past_the_bound_only() -> None:
    rule = Staleness(max_lag=2, batch_groups=1)
    assert [rule.overdue(oldest=o, committed=6) for o in (3, 4, 5)] == [True, False, False]


@pytest.mark.parametrize(
    ("on_stale", "max_lag", "holds", "drops"),
    [
        ("hold", 1, True, False),
        ("wait", 1, True, False),
        ("mask", 1, False, False),
        ("drop", 1, False, True),
        ("drop", 0, True, False),
        ("mask", 0, True, False),
    ],
)
def test_modes(on_stale, max_lag: int, holds: bool, drops: bool) -> None:
    rule = Staleness(max_lag=max_lag, batch_groups=3, on_stale=on_stale)
    assert (rule.holds, rule.drops, rule.most_outstanding) == (holds, drops, 3 * (max_lag + 1))


def test_the_reserve_ahead_is_in_batches() -> None:
    assert Staleness(max_lag=9, batch_groups=4, reserve_ahead=3).most_outstanding == 12


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_lag": -1}, "max_lag=-1"),
        ({"batch_groups": 0}, "batch_groups=0"),
        ({"reserve_ahead": 0}, r"reserve_ahead=0 < 1 batch: .* wait for ever; use at least 1"),
        ({"max_lag": 3, "reserve_ahead": 5}, r"reserve_ahead=5 > 4: staleness\.max_lag=3 admits 4 .* ignored; raise max_lag"),
        ({"on_stale": "wait", "reserve_ahead": 2}, "reserve_ahead=2 with on_stale='wait'"),
        ({"max_masked_share": 1.5}, r"max_masked_share=1\.5 is outside"),
        ({"max_masked_share": 0.1, "on_stale": "mask"}, "max_masked_share=0.1 with on_stale='mask' would be ignored"),
        ({"selector": "freshest"}, "selector='freshest' with on_stale='hold'"),
        ({"on_stale": "wait", "selector": "uniform"}, "on_stale='wait'"),
        ({"max_lag": 0, "on_stale": "mask", "selector": "uniform"}, "max_lag=0 always holds"),
    ],
)
def test_unreachable_rules_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Staleness(**({"max_lag": 1, "batch_groups": 2} | fields))
