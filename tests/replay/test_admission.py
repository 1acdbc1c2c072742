"""Reservations: room, retries, lost groups. `fakes.Bench` plays generators, reward and learner."""

from types import SimpleNamespace

import pytest

from asyncrl.errors import ConfigError
from asyncrl.replay.log import events as ev
from asyncrl.replay.plan import ticket_seed
from asyncrl.types import Version


@pytest.mark.parametrize(
    ("max_lag", "ahead", "asked", "granted"),
    [(0, None, 9, 2), (1, None, 9, 4), (1, None, 1, 1), (4, None, 99, 10), (4, 2, 9, 4)],
)
def test_room_at_the_start(fakes: SimpleNamespace, max_lag: int, ahead: int | None, asked: int, granted: int) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=max_lag, batch=2, size=20, ahead=ahead))
    assert len(bench.reserve(asked, 0).tickets) == granted
    more = len(bench.reserve(99, 0, worker="other").tickets)
    assert granted + more == (ahead or max_lag + 1) * 2


def test_the_report_says_which_number_limits_generation(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=4, batch=2, size=20, ahead=2))
    bench.fence(0)

    def limits(seconds: float) -> tuple[float, float]:
        """Shares of (reserve_ahead, max_lag), after so many seconds more."""
        bench.sleep(seconds)
        gauges = bench.report(0).gauges
        return gauges["limit/reserve_ahead"], gauges["limit/max_lag"]

    for ticket in bench.reserve(2, 0).tickets:  # all that was asked for
        bench.submit(ticket, 0)
        bench.score(ticket, 1.0, 0.0)
    assert limits(10) == (0.0, 0.0)
    bench.reserve(9, 0, "b")  # two more, and then no room
    assert limits(10) == pytest.approx((0.5, 0.0))
    bench.train(0)
    bench.reserve(9, -4, "b")  # weights so old that the bound admits nothing more
    assert limits(20) == pytest.approx((0.25, 0.5))


def test_what_a_caller_waits_for(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=2, size=2, epochs=2))
    bench.fence(0)
    bench.ready(2, update=0)
    assert bench.reserve(1, 0, "b").waiting_for == "bound full"
    bench.train(0)
    assert bench.reserve(1, 0, "b").waiting_for == "weights too old"
    assert len(bench.reserve(9, 1, "b").tickets) == 2
    assert bench.reserve(1, 1, "c").waiting_for == "data"


def test_tickets_are_what_a_plain_loop_would_compute(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=2))
    tickets = bench.reserve(3, 0).tickets
    assert [t.prompt.row for t in tickets] == [100, 101, 102]
    assert tickets[2].seeds == tuple(ticket_seed(7, "train", 2, 0, r) for r in (0, 1))
    assert [(t.group, t.attempt, t.purpose, t.pinned) for t in tickets] == [(i, 0, "train", None) for i in range(3)]


def test_a_failed_prompt_is_retried_with_other_seeds_and_then_given_up(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, size=2, epochs=1, max_attempts=2))
    (first,) = bench.reserve(1, 0).tickets
    bench.submit(first, 0)
    bench.score(first, None, None)
    (again,) = bench.reserve(1, 0).tickets
    assert again.prompt == first.prompt
    assert again.group != first.group
    assert set(again.seeds).isdisjoint(first.seeds)
    bench.submit(again, 0)
    bench.score(again, None, None)
    assert bench.reserve(1, 0).tickets[0].prompt.row == 101  # two attempts are enough
    assert bench.core.ledger.counts().failed == 2


def test_too_few_valid_rollouts_fail_a_group(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(n=3, min_valid=2))
    a, b = bench.reserve(2, 0).tickets
    for ticket in (a, b):
        bench.submit(ticket, 0)
    bench.score(a, 1.0, None, None)
    bench.score(b, 1.0, 0.0, None)
    assert (bench.core.ledger.counts().failed, bench.core.ledger.ready) == (1, {b.group})


class TestLostGroups:
    def test_no_longer_named_is_reissued_for_its_missing_rollouts(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=1, batch=1))
        a, b = bench.reserve(2, 0).tickets
        bench.submit(a, 0, rollouts=[1])
        (again,) = bench.reserve(1, 0, held=[b.group]).tickets
        assert (again.group, again.attempt, again.rollouts) == (a.group, 1, (0,))
        assert again.seeds == a.seeds[:1]  # the very same work
        assert bench.submit(a, 0) == 0  # late rows of the first attempt are ignored
        assert bench.submit(again, 0) == 1

    def test_a_lost_answer_loses_nothing(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=0, batch=2))
        lost = bench.reserve(2, 0).tickets
        again = bench.reserve(2, 0, held=[]).tickets
        assert [t.group for t in again] == [t.group for t in lost]

    def test_silence_for_the_lease_is_loss_and_coming_back_in_time_undoes_it(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, lease_s=30))
        (mine,) = bench.reserve(1, 0).tickets
        bench.sleep(29)
        assert not bench.reserve(1, 0, "other").tickets
        bench.sleep(2)
        assert bench.reserve(0, 0, held=[mine.group]).cancelled == ()  # back before anybody took it
        assert not bench.reserve(1, 0, "other").tickets
        bench.sleep(31)
        (taken,) = bench.reserve(1, 0, "other").tickets
        assert (taken.group, taken.attempt) == (mine.group, 1)
        assert bench.reserve(0, 0, held=[mine.group]).cancelled == (mine.group,)

    def test_a_newer_incarnation_of_the_worker_reissues_at_once(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=0, batch=1))
        (old,) = bench.reserve(1, 0, incarnation=1).tickets
        (new,) = bench.reserve(1, 0, incarnation=2).tickets
        assert (new.group, new.attempt) == (old.group, 1)

    def test_weights_that_would_break_the_bound_must_wait(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=1, batch=1))
        bench.fence(0)
        bench.ready(1, update=0)
        bench.train(0)
        bench.ready(1, update=0)  # must be trained next
        (lost,) = bench.reserve(1, 1, "dies").tickets
        assert bench.reserve(1, 0, "dies", incarnation=2).tickets == ()  # would have to be next, too
        (again,) = bench.reserve(1, 1, "dies", incarnation=2).tickets
        assert (again.group, again.attempt) == (lost.group, 1)

    def test_nobody_waits_for_a_lost_group_and_its_holder_gets_it_back_only_in_time(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, ahead=2))
        bench.fence(0)
        (mine,) = bench.reserve(1, 0, "slow").tickets
        bench.ready(1, update=0)
        bench.train(0)
        bench.ready(1, update=1)
        assert bench.lease_batch(1, 1).waiting_for == "stragglers"
        bench.sleep(31)
        bench.train(1)
        assert bench.submit(mine, 0) == 0  # too old by now
        assert bench.reserve(0, 2, "slow", held=[mine.group]).cancelled == (mine.group,)
        (again,) = bench.reserve(1, 2, "slow").tickets
        assert (again.group, again.attempt) == (mine.group, 1)

    def test_rollouts_of_a_lost_group_keep_their_deadline(self, fakes: SimpleNamespace) -> None:
        """The other rollouts are generated again from newer weights, but those that it has get no younger."""
        bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, ahead=2))
        bench.fence(0)
        (half,) = bench.reserve(1, 0, "dies").tickets
        bench.submit(half, 0, rollouts=[0])
        bench.ready(1, update=0)
        bench.train(0)
        (again,) = bench.reserve(1, 1, "dies", incarnation=2).tickets
        bench.ready(1, update=1)
        assert (again.group, again.rollouts) == (half.group, (1,))
        assert bench.lease_batch(1, 1).waiting_for == "stragglers"
        bench.submit(again, 1)
        bench.call("score", 0, [fakes.score(half, 0, 1.0), fakes.score(again, 1, 0.0)])
        assert bench.train(1) == (half.group,)

    def test_a_store_that_restarts_takes_what_was_lost_as_lost(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, ahead=2))
        bench.fence(0)
        (mine,) = bench.reserve(1, 0, "slow").tickets
        for update in range(2):
            bench.sleep(31)
            bench.ready(1, update)
            bench.train(update)
        bench.core = bench.build()
        bench.ready(1, update=2)
        assert bench.train(2)  # it holds up nobody now either
        assert bench.reserve(0, 2, "slow", held=[mine.group]).cancelled == (mine.group,)

    def test_a_store_that_restarts_takes_as_lost_what_has_no_rollout_yet(self, fakes: SimpleNamespace) -> None:
        """Two groups are due at the next update, which takes one: the other must have been lost."""
        bench = fakes.Bench(fakes.plan(max_lag=2, batch=1, ahead=3))
        bench.fence(0)
        (silent,) = bench.reserve(1, 0, "silent").tickets
        (half,) = bench.reserve(1, 0, "slow").tickets
        bench.submit(half, 0, rollouts=[0])
        bench.sleep(31)
        for update in range(2):
            # A caller that names the lost group does not get it again.
            (ticket,) = bench.reserve(1, update, "slow", held=[half.group, silent.group]).tickets
            bench.submit(ticket, update)
            bench.score(ticket, 1.0, 1.0)
            bench.train(update)
        bench.core = bench.build()
        lost = [bench.core.holders.is_lost(group) for group in (silent.group, half.group)]
        assert lost == [True, False]


def test_weights_of_a_lost_lineage_count_as_the_restored_ones(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, size=9))
    bench.fence(0)
    for update in range(3):
        bench.ready(1, update)
        bench.train(update)
    bench.fence(1)  # two batches are reopened
    # the generator still has update 3 of incarnation 1
    assert bench.call("reserve", 1, Version(1, 3), [], 0.0).waiting_for == "bound full"


def test_a_reissue_logs_the_update_that_was_checked(fakes: SimpleNamespace) -> None:
    """Weights of a lost lineage count as those of the checkpoint, to which their holder is about to fall back."""
    bench = fakes.Bench(fakes.plan(max_lag=4, batch=1))
    bench.fence(0)
    for update in range(3):
        bench.ready(1, update)
        bench.train(update)
    (lost,) = bench.reserve(1, 3).tickets
    bench.fence(1)
    again = bench.call("reserve", 1, Version(1, 3), [], 0.0).tickets
    assert [t.group for t in again] == [lost.group]
    assert bench.log[-1] == ev.GroupReissued(lost.group, 1, 1, "gen", 1, lost=2 * 8)
    assert bench.core.ledger.groups[lost.group].update == 1


def test_a_pause_of_the_store_is_no_silence_of_its_callers(fakes: SimpleNamespace) -> None:
    """It was stopped, or its disk hung: nobody could renew a lease, and whoever calls first must not get everybody's work."""
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=2, lease_s=30))
    a, b = bench.reserve(2, 0, "slow").tickets
    bench.submit(a, 0)
    lease, rows = bench.lease_unscored(9, "r0", 1)
    assert len(rows) == 2
    for _ in range(3):
        bench.clock.now += 600
        assert bench.reserve(1, 0, "quick").tickets == ()
        assert bench.lease_unscored(9, "r1", 1) == (0, [])
    assert bench.reserve(0, 0, "slow", held=[b.group]).cancelled == ()
    bench.extend(lease, "r0")
    bench.sleep(31)
    assert [t.group for t in bench.reserve(1, 0, "quick").tickets] == [b.group], "silence is silence as before"
    assert bench.lease_unscored(9, "r1", 1)[1] == rows


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ahead": 3}, "reserve_ahead=3 > 2"),
        ({"batch": 9, "size": 8}, "cannot fill"),
        ({"n": 2, "min_valid": 3}, "min_valid=3"),
    ],
)
def test_unreachable_plans_are_refused(fakes: SimpleNamespace, options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fakes.plan(**options)
