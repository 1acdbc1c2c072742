"""The router: least loaded first, affinity while it costs nothing, never a replica that is down."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncrl.generate.sglang.router import AFFINITY, Router


def made(*windows: int, remember: int = 4096) -> Router:
    router = Router(windows, remember=remember)
    for replica in range(len(windows)):
        router.up(replica)
    return router


def test_nothing_is_picked_until_a_replica_is_up() -> None:
    router = Router([8, 8])
    assert router.pick(0, 4) is None
    router.up(1)
    assert router.pick(0, 4) == 1
    router.down(1)
    assert router.pick(0, 4) is None


def test_least_loaded_relative_to_its_window() -> None:
    router = made(8, 32)
    assert router.pick(0, 8) == 1  # 8 of 32 against 8 of 8
    router.began(1, 24)
    assert router.pick(1, 2) == 0  # 2 of 8 against 26 of 32
    router.set_window(0, 2)
    router.began(0, 2)
    assert router.pick(2, 1) == 1  # 3 of 2 against 25 of 32


# Windows of 16; a group of 4 was served by replica 1, and asks again.
@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ((0, 0), 1),  # even: stays
        ((0, 4), 1),  # a quarter of a window busier: stays
        ((0, 5), 0),  # more than that: moves
        ((8, 12), 1),  # 16 of 16: still fits
        ((9, 13), 0),  # 17 of 16 would wait there, 13 of 16 runs here
        ((13, 14), 1),  # it waits anywhere
    ],
)
def test_affinity_as_long_as_it_costs_no_balance(rows: tuple[int, int], chosen: int) -> None:
    router = made(16, 16)
    router.began(0, 1)
    assert router.pick(7, 4) == 1
    router.ended(0, 1)
    for replica, count in enumerate(rows):
        router.began(replica, count)
    assert router.pick(7, 4) == chosen
    assert AFFINITY == 0.25  # what the cases above were made for


def test_affinity_is_with_the_last_that_served() -> None:
    router = made(16, 16)
    assert router.pick(7, 4) == 0
    router.down(0)
    assert router.pick(7, 4) == 1
    router.up(0)
    assert router.pick(7, 4) == 1


def test_the_group_asked_for_longest_ago_is_forgotten() -> None:
    router = made(64, 64, remember=2)
    router.began(0, 1)
    assert [router.pick(group, 1) for group in (1, 2)] == [1, 1]
    router.began(1, 2)  # now 0 is the emptier one
    assert router.pick(1, 1) == 1  # asked for again
    assert router.pick(3, 1) == 0  # 2 is forgotten
    assert [router.pick(group, 1) for group in (1, 3, 2)] == [1, 0, 0]
    assert len(router._served) == 2


def test_rows_that_never_began_cannot_end() -> None:
    router = made(4)
    router.began(0, 2)
    with pytest.raises(ValueError, match=r"3 rows ended at replica 0, which had 2"):
        router.ended(0, 3)
    assert router.rows(0) == 2


@pytest.mark.parametrize("make", [lambda: Router([4, 0]), lambda: made(4, 4).set_window(1, 0)])
def test_a_window_takes_at_least_one(make: object) -> None:
    with pytest.raises(ValueError, match="window of replica 1 = 0 < 1"):
        make()  # type: ignore[operator]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=6), st.integers(1, 8), st.integers(1, 200))
def test_many_equal_groups_are_spread_by_window(windows: list[int], rows: int, groups: int) -> None:
    router = made(*windows)
    for group in range(groups):
        chosen = router.pick(group, rows)
        assert chosen is not None
        router.began(chosen, rows)
    loads = [router.rows(replica) / slots for replica, slots in enumerate(windows)]
    # No replica is ahead of another by more than the one group that it got last.
    for replica, slots in enumerate(windows):
        assert (
            loads[replica] - rows / slots
            <= min(other + rows / windows[i] for i, other in enumerate(loads)) - rows / slots + 1e-9
        )


class Traffic(RuleBasedStateMachine):
    """Any order of picks, ends, failures and window changes, against a plain model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = [4, 16, 16]
        self.alive = [False] * 3
        self.sent: list[tuple[int, int]] = []
        self.router = Router(self.windows, remember=5)

    @rule(group=st.integers(0, 20), rows=st.integers(1, 8))
    def send(self, group: int, rows: int) -> None:
        chosen = self.router.pick(group, rows)
        if chosen is None:
            assert not any(self.alive)
            return
        assert self.alive[chosen]
        self.router.began(chosen, rows)
        self.sent.append((chosen, rows))

    @rule(group=st.integers(0, 20))
    def ask_twice(self, group: int) -> None:
        assert self.router.pick(group, 1) == self.router.pick(group, 1)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.sent:
            self.router.ended(*self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1))))

    @rule(replica=st.integers(0, 2), up=st.booleans())
    def turn(self, replica: int, up: bool) -> None:
        self.alive[replica] = up
        (self.router.up if up else self.router.down)(replica)

    @rule(replica=st.integers(0, 2), slots=st.integers(1, 32))
    def resize(self, replica: int, slots: int) -> None:
        self.router.set_window(replica, slots)

    @invariant()
    def loads_are_what_was_sent(self) -> None:
        for replica in range(3):
            assert self.router.rows(replica) == sum(rows for to, rows in self.sent if to == replica) >= 0
        assert len(self.router._served) <= 5


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
