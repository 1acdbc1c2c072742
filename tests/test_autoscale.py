"""The rule by which a run grows and shrinks: what a load asks for, and when that is decided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.autoscale import CALM, HELD, SHORT, Autoscaler, Decision, Load, wanted

SHARES = st.floats(0.0, 1.0)


def load(short: float = 0.0, held: float = 0.0, used: float = 1.0) -> Load:
    return Load(short=short, held=held, used=used)


@pytest.mark.parametrize(
    ("up", "seen", "number"),
    [
        (4, load(), None),
        (4, load(short=0.09), None),
        (4, load(short=0.2), 5),
        (4, load(short=0.5), 8),
        (4, load(short=0.99), 8),  # twice as many at a time
        (12, load(short=0.5), 16),  # the most
        (4, load(short=0.5, held=0.3), None),  # more would be held back as well
        (8, load(held=0.5, used=0.4), 4),
        (8, load(held=0.5, used=0.1), 4),  # half of them at a time
        (3, load(held=0.5, used=0.1), 2),  # the fewest
        (8, load(held=0.9, used=0.69), 7),  # a fifth of the room is left to them
        (8, load(held=0.9, used=0.79), None),
        (4, load(held=0.6, used=0.95), None),  # never up: nobody waits for more
        (8, load(held=0.29, used=0.1), None),  # long tails leave slots empty; nobody is held back
        (8, load(short=0.03, held=0.9, used=0.1), None),  # the learner waits a little
    ],
)
def test_what_a_load_asks_for(up, seen, number):
    found = wanted(up, seen, 2, 16)
    assert (found and found.number) == number


@given(st.integers(1, 2000), SHARES, SHARES, SHARES)
def test_what_is_asked_for_lies_between_the_fewest_and_the_most_and_never_jumps(up, short, held, used):
    least, most = max(1, up // 3), up * 3
    found = wanted(up, load(short, held, used), least, most)
    if found is None:
        assert not (short >= SHORT and held < HELD)
        assert not (short < CALM and held >= HELD) or max(up * used / 0.8, up / 2, least) > up - 1
    elif short >= SHORT:
        assert up <= found.number <= min(2 * up, most)
    else:
        assert max(up / 2, least, up * used) <= found.number + 1e-6  # nobody who is at work is given up
        assert found.number <= max(up * used / 0.8 + 1, up / 2 + 1, least)
        assert found.number < up


class World:
    """A rule on a clock that the test sets."""

    def __init__(self, least: int = 1, most: int = 16) -> None:
        self.now, self.committed = 0.0, 0
        self.rule = Autoscaler(least, most, 60.0, lambda: self.now)

    def pass_(self, seconds: float, updates: int) -> None:
        self.now += seconds
        self.committed += updates

    def look(self, seen: Load, count: int, up: int | None = None) -> Decision | None:
        up = count if up is None else up
        if self.rule.begins(up, count, self.committed) or not self.rule.due(self.committed):
            return None
        return self.rule.decide(up, count, self.committed, seen)


def test_a_run_is_judged_from_its_first_update_on_over_a_minute_and_three_updates():
    world, short = World(), load(short=0.5)
    world.pass_(500.0, 0)
    assert world.look(short, 2) is None, "nothing was trained"
    world.pass_(1.0, 1)
    assert world.look(short, 2) is None
    world.pass_(59.0, 10)
    assert world.look(short, 2) is None
    world.pass_(1.0, 0)
    assert world.look(short, 2) == (4, "the learner waited for 50% of the time")
    slow = World()
    slow.pass_(1.0, 1)
    slow.look(short, 2)
    slow.pass_(100.0, 2)
    assert slow.look(short, 2) is None, "two updates are no rate"
    slow.pass_(500.0, 0)
    assert slow.look(short, 2) is not None, "but nothing is waited for without end"


def test_what_was_decided_on_is_awaited_and_then_judged_anew():
    world, short = World(), load(short=0.5)
    world.pass_(1.0, 1)
    world.look(short, 2)
    world.pass_(60.0, 5)
    assert world.look(short, 2) == (4, "the learner waited for 50% of the time")
    world.pass_(300.0, 20)
    assert world.look(short, 4, up=3) is None, "the fourth is on its way"
    world.pass_(1.0, 0)
    assert world.look(short, 4) is None, "all are up: judged from now on"
    world.pass_(60.0, 4)
    assert world.look(short, 4) is not None
    world.pass_(601.0, 40)
    assert world.look(short, 8, up=5) is None, "no node came for the others: judged all the same"
    world.pass_(60.0, 4)
    assert world.look(short, 8, up=5) is None, "more are not asked for, though"
    calm = load(held=0.9, used=0.1)
    for _ in range(2):
        world.pass_(60.0, 4)
        found = world.look(calm, 8, up=5)
    assert found == (3, "held back for 90% of the time, with 10% of the room used")


def test_where_nodes_come_and_go_it_is_enough_that_most_are_there():
    world, short = World(most=64), load(short=0.5)
    world.pass_(1.0, 1)
    assert world.rule.begins(12, 16, 1) is False, "a quarter is on its way"
    assert world.look(short, 16, up=13) is None, "judged from now on"
    world.pass_(60.0, 4)
    assert world.look(load(short=0.15), 16, up=13) is None, "16 would do"
    world.pass_(60.0, 4)
    assert world.look(short, 16, up=13) == (26, "the learner waited for 50% of the time")


def test_actors_are_given_up_only_when_they_were_too_many_twice_in_a_row():
    world, calm, busy = World(), load(held=0.5, used=0.2), load()
    world.pass_(1.0, 1)
    world.look(calm, 8)
    decided = []
    for seen in (calm, busy, calm, calm):
        world.pass_(60.0, 4)
        decided.append(world.look(seen, 8))
    assert decided == [None, None, None, (4, "held back for 50% of the time, with 20% of the room used")]


@given(st.integers(1, 16), st.floats(0.05, 20.0))
def test_a_steady_run_comes_to_rest(count, needed):
    """`needed` generators would just keep the learner busy: what they make beyond is held back. The rule finds a number that
    does, if it may have so many, and then changes nothing."""
    world, history = World(), []
    world.pass_(1.0, 1)
    for _ in range(60):
        short = max(0.0, 1 - count / needed)
        seen = load(short=short, held=0.0 if short else max(0.0, 1 - needed / count), used=min(1.0, needed / count))
        if (found := world.look(seen, count)) is not None:
            count = found.number
        history.append(count)
        world.pass_(60.0, 4)
    assert len({*history[-20:]}) == 1
    assert count >= min(16, needed) * (1 - SHORT)
    found = wanted(count, seen, 1, 16)
    assert found is None or found.number == count
