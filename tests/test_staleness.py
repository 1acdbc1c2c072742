import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.errors import ConfigError
from asyncrl.staleness import Staleness, lag


@pytest.mark.parametrize(
    ("max_lag", "batch", "outstanding", "committed", "update", "room"),
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
def test_room(max_lag: int, batch: int, outstanding: int, committed: int, update: int, room: int) -> None:
    rule = Staleness(max_lag=max_lag, batch_groups=batch)
    assert rule.room(outstanding=outstanding, committed=committed, update=update) == room


@given(
    max_lag=st.integers(0, 8),
    batch=st.integers(1, 9),
    committed=st.integers(0, 20),
    behind=st.integers(0, 9),
    k=st.integers(1, 50),
)
def test_an_admitted_group_trains_within_the_bound(max_lag: int, batch: int, committed: int, behind: int, k: int) -> None:
    rule, update = Staleness(max_lag=max_lag, batch_groups=batch), committed - behind
    outstanding = rule.room(outstanding=0, committed=committed, update=update) - k  # so that the k-th just fits
    if outstanding < 0:
        return
    assert rule.room(outstanding=outstanding, committed=committed, update=update) == k
    newest = outstanding + k - 1
    assert committed + newest // batch - update <= max_lag
    assert committed + (newest + 1) // batch - update > max_lag  # the bound is tight: one more would break it
    assert rule.reissuable(position=newest, committed=committed, update=update)
    assert not rule.reissuable(position=newest + 1, committed=committed, update=update)


def test_trainable_tokens_are_neither_too_old_nor_from_the_future() -> None:
    rule = Staleness(max_lag=2, batch_groups=1)
    updates = np.array([3, 4, 5, 6, 7])
    assert rule.trainable(updates, committed=6).tolist() == [False, True, True, True, False]


def test_overdue_is_past_the_bound_only() -> None:
    rule = Staleness(max_lag=2, batch_groups=1)
    assert [rule.overdue(oldest=o, committed=6) for o in (3, 4, 5)] == [True, False, False]
    assert lag(committed=6, update=4) == 2


def test_zero_lag_always_waits() -> None:
    rule = Staleness(max_lag=0, batch_groups=1, on_stale="drop")
    assert rule.waits
    assert not rule.drops


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_lag": -1}, "max_lag=-1"),
        ({"batch_groups": 0}, "batch_groups=0"),
        ({"on_stale": "wait", "selector": "freshest"}, "on_stale='wait'"),
        ({"max_lag": 0, "selector": "uniform"}, "max_lag=0 always waits"),
    ],
)
def test_unreachable_rules_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Staleness(**({"max_lag": 1, "batch_groups": 2} | fields))
