"""What the learner leases, commits and retrains. `fakes.Bench` plays generators, reward and learner."""

import itertools
from types import SimpleNamespace

import pytest

from asyncrl.errors import CheckpointError, Closed, ConfigError, Fenced
from asyncrl.lineage import Lineage
from asyncrl.replay.log import events as ev
from asyncrl.replay.log.events import CheckpointRetained, LearnerFenced
from asyncrl.replay.plan import keep_varied
from asyncrl.replay.state import Group
from asyncrl.types import Version


def test_mask_takes_the_oldest_ready_groups_past_a_straggler(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=2, on_stale="mask"))
    bench.fence(0)
    (straggler,) = bench.reserve(1, 0, "slow").tickets
    a, b, c = bench.ready(3, 0)
    assert bench.train(0) == (a.group, b.group)
    assert bench.lease_batch(1, 1).waiting_for == "ready groups"
    bench.submit(straggler, 0, 0, 1)  # its last token is fresh enough
    bench.score(straggler, 1.0, 0.0)
    assert bench.train(1) == (straggler.group, c.group)


def test_mask_evicts_only_groups_without_a_token_to_train(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, on_stale="mask"))
    bench.fence(0)
    old, half = bench.reserve(2, 0).tickets
    bench.core.ledger.committed = 2  # only their age matters here
    bench.submit(old, 0)
    bench.submit(half, 0, rollouts=[0])
    bench.submit(half, 0, 1, rollouts=[1])
    bench.score(old, 1.0, 1.0)
    bench.score(half, 1.0, 1.0)
    lease = bench.lease_batch(1, 2)
    assert lease.groups == (half.group,)
    assert [row for row, _ in bench.ok_rows(1, lease.groups)] == [2, 3]  # the learner masks the first, and uses its reward
    assert bench.core.ledger.counts().evicted == 1
    assert not bench.core.ledger.retries  # mask does not try again


def test_hold_trains_past_a_straggler_until_it_would_be_late(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=2, batch=2, ahead=2))
    bench.fence(0)
    (straggler,) = bench.reserve(1, 0, "slow").tickets
    for update in range(2):
        a, b = bench.ready(2, update)
        assert bench.train(update) == (a.group, b.group)
    c, _ = bench.ready(2, 2)
    assert bench.lease_batch(1, 2).waiting_for == "stragglers"  # its first token may be trained by this update at the latest
    bench.submit(straggler, 0, 2)
    bench.score(straggler, 1.0, 0.0)
    assert bench.train(2) == (straggler.group, c.group)


def test_a_batch_that_is_held_back_looks_at_no_ready_group(fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's call is tried again after every row and score of a straggler."""
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=2, size=16))
    bench.fence(0)
    stragglers = bench.reserve(2, 0, "slow").tickets
    bench.ready(2, 0)
    bench.train(0)
    bench.ready(2, 1)
    bench.lease_batch(1, 1)
    looks: list[int] = []
    monkeypatch.setattr(Group, "oldest", lambda group, oldest=Group.oldest: looks.append(group.id) or oldest(group))
    assert bench.lease_batch(1, 1).waiting_for == "stragglers"
    assert looks == []
    for straggler in stragglers:
        bench.submit(straggler, 0)
        bench.score(straggler, 1.0, 0.0)
    assert bench.train(1) == tuple(s.group for s in stragglers)


def test_hold_takes_the_earliest_deadlines_first(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=4, batch=1))
    bench.fence(0)
    a, b, c = bench.reserve(3, 0).tickets
    bench.core.ledger.committed = 2  # only their age matters here
    for ticket, update in ((a, 2), (b, 1), (c, 2)):
        bench.submit(ticket, update)
        bench.score(ticket, 1.0, 1.0)
    assert [bench.lease_batch(1, update).groups for update in (2, 3, 4)] == [(b.group,), (a.group,), (c.group,)]


def test_hold_waits_for_as_many_stragglers_as_would_be_late_together(fakes: SimpleNamespace) -> None:
    """Three of one deadline fit into no two batches of one: the last batch before that must be one of them."""
    bench = fakes.Bench(fakes.plan(max_lag=2, batch=1))
    bench.fence(0)
    slow = bench.reserve(2, 0, "slow").tickets
    bench.ready(1, 0)
    bench.train(0)  # two stragglers, two updates left
    fresh, other = bench.ready(1, 1)[0], slow[0]
    assert bench.lease_batch(1, 1).waiting_for == "stragglers"
    bench.submit(other, 0)
    bench.score(other, 1.0, 0.0)
    assert bench.train(1) == (other.group,)
    assert bench.lease_batch(1, 2).waiting_for == "stragglers"
    bench.submit(slow[1], 0)
    bench.score(slow[1], 1.0, 0.0)
    assert [bench.train(2), bench.train(3)] == [(slow[1].group,), (fresh.group,)]


def test_hold_excuses_the_share_it_may(fakes: SimpleNamespace) -> None:
    """A quarter of four: the first straggler that would be late is masked, the second is waited for."""
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=2, size=20, ahead=2, masked=0.25))
    bench.fence(0)
    one, two = bench.reserve(2, 0, "slow").tickets
    bench.ready(2, 0)
    bench.train(0)
    bench.ready(2, 1)
    assert bench.lease_batch(1, 1).waiting_for == "stragglers"  # both would be late, and only one may be
    bench.submit(two, 0)
    bench.score(two, 1.0, 0.0)
    trained = bench.train(1)
    assert two.group in trained
    assert bench.core.ledger.excused == 1
    bench.core = bench.build()  # it is remembered
    bench.submit(one, 0, 2)  # masked in part, by the learner
    bench.score(one, 1.0, 0.0)
    assert one.group in bench.train(2)


def test_what_was_excused_is_evicted_where_nothing_of_it_can_be_trained(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, size=20, ahead=2, masked=1.0))
    bench.fence(0)
    (late,) = bench.reserve(1, 0, "slow").tickets
    for update in range(3):
        bench.ready(1, update)
        bench.train(update)
    bench.submit(late, 0)
    bench.score(late, 1.0, 0.0)
    bench.ready(1, 3)
    bench.train(3)
    assert bench.core.ledger.counts().evicted == 1


def test_a_smaller_bound_after_a_resume_evicts_what_it_can_train_no_more(fakes: SimpleNamespace) -> None:
    """Prompts of evicted groups are tried again, ready ones are spared before those in flight, and the run goes on."""
    bench = fakes.Bench(fakes.plan(max_lag=4, batch=1, size=20))
    bench.fence(0)
    ready = bench.ready(3, 0)
    flying = bench.reserve(2, 0, "slow").tickets
    bench.plan = fakes.plan(max_lag=1, batch=1, size=20)
    bench.core = bench.build()
    bench.fence(0)
    assert sorted(bench.core.ledger.groups) == [*(t.group for t in ready[:2]), *(t.group for t in flying)]
    assert bench.core.ledger.counts().evicted == 1
    assert bench.reserve(0, 0, "slow", held=[t.group for t in flying]).cancelled == tuple(t.group for t in flying)
    assert [bench.train(0), bench.train(1)] == [(t.group,) for t in ready[:2]]
    again = bench.reserve(2, 2).tickets
    assert [t.group for t in again] == [t.group for t in flying]


def test_hold_closes_ranks_over_filtered_groups(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=2, keep=keep_varied))
    bench.fence(0)
    a, b, c = bench.reserve(3, 0).tickets
    for ticket, rewards in ((a, (1.0, 0.0)), (b, (1.0, 1.0)), (c, (0.0, 1.0))):
        bench.submit(ticket, 0)
        bench.score(ticket, *rewards)
    assert bench.train(0) == (a.group, c.group)
    assert bench.core.ledger.counts().filtered == 1


def test_drop_cancels_what_is_in_flight_evicts_what_is_ready_and_tries_both_again(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=2, batch=1, on_stale="drop", size=9))
    bench.fence(0)
    flying, mixed = bench.reserve(2, 0, "slow").tickets
    bench.submit(mixed, 0, 1)
    for update in range(3):
        (ticket,) = bench.ready(1, update)
        assert bench.train(update) == (ticket.group,)
    bench.score(mixed, 1.0, 0.0)  # too late: its oldest token is three behind
    assert not bench.lease_batch(1, 3).groups
    assert bench.core.ledger.counts().evicted == 2
    assert bench.reserve(0, 3, "slow", held=[flying.group]).cancelled == (flying.group,)
    again = bench.reserve(2, 3).tickets
    assert [t.prompt.row for t in again] == [flying.prompt.row, mixed.prompt.row]


@pytest.mark.parametrize(("selector", "expected"), [("oldest", [0, 2]), ("freshest", [1, 2])])
def test_selectors(fakes: SimpleNamespace, selector: str, expected: list[int]) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=4, batch=2, on_stale="mask", selector=selector))
    bench.fence(0)
    tickets = bench.reserve(3, 0).tickets
    bench.core.ledger.committed = 2
    for ticket, updates in zip(tickets, ((0, 2), (2,), (1, 2)), strict=True):
        bench.submit(ticket, *updates)
        bench.score(ticket, 1.0, 1.0)
    assert bench.lease_batch(1, 2).groups == tuple(tickets[i].group for i in expected)


def test_prefetch_leases_the_next_batch_by_the_update_it_is_for(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, on_stale="hold"))
    bench.fence(0)
    a, b = bench.ready(2, 0)
    first, second = bench.lease_batch(1, 0), bench.lease_batch(1, 1)
    assert (first.groups, second.groups) == ((a.group,), (b.group,))
    assert bench.lease_batch(1, 0) == first  # asking again changes nothing
    with pytest.raises(ValueError, match="next batch is trained after update 2"):
        bench.lease_batch(1, 4)
    with pytest.raises(ValueError, match="in the order of leasing"):
        bench.commit(second.lease, Version(1, 2), {})
    bench.commit(first.lease, Version(1, 1), {})
    bench.commit(second.lease, Version(1, 2), {})
    assert bench.core.ledger.counts().trained == 2


def test_commit_is_counted_once(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=1))
    bench.fence(0)
    bench.ready(1, 0)
    lease = bench.lease_batch(1, 0)
    for _ in range(2):
        bench.commit(lease.lease, Version(1, 1), {"loss": 2})
    (record,) = bench.report(0).records
    assert (record.kind, record.version, record.metrics, record.sequence) == ("step", Version(1, 1), {"loss": 2.0}, 1)
    assert bench.report(1).records == ()


class TestRestore:
    def test_commits_after_the_checkpoint_are_retrained_first_in_order(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=4, batch=2, size=20))
        bench.fence(0)
        bench.ready(8, 0)
        batches = [bench.train(u) for u in range(3)]
        held = bench.lease_batch(1, 3)
        fence = bench.fence(1)
        assert (fence.incarnation, fence.committed, fence.reopened) == (2, 1, 2)
        counts = bench.core.ledger.counts()
        assert (counts.trained, counts.pending) == (2, 6)
        with pytest.raises(Fenced):
            bench.commit(held.lease, Version(1, 4), {})
        with pytest.raises(Fenced):
            bench.lease_batch(1, 3)
        again = bench.lease_batch(2, 1)
        assert (again.groups, again.replayed) == (batches[1], True)
        bench.commit(again.lease, Version(2, 2), {})
        assert bench.train(2) == batches[2]
        assert bench.train(3) == held.groups  # the void lease's groups were ready again
        assert bench.core.ledger.counts().trained == 8

    def test_a_replay_that_is_cut_short_is_replayed_again(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=4, batch=1))
        bench.fence(0)
        bench.ready(3, 0)
        batches = [bench.train(u) for u in range(3)]
        bench.fence(0)
        bench.train(0)
        bench.lease_batch(2, 1)
        assert bench.fence(1).reopened == 2
        assert [bench.train(u) for u in (1, 2)] == batches[1:]

    def test_a_checkpoint_the_log_does_not_know_is_refused(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=4, batch=1))
        bench.fence(0)
        bench.ready(2, 0)
        bench.train(0)
        bench.train(1)
        with pytest.raises(CheckpointError, match="update 5 > 2"):
            bench.fence(5)
        bench.checkpointed(2)
        with pytest.raises(CheckpointError, match="update 1 < 2"):
            bench.fence(1)
        with pytest.raises(ValueError, match="commit before saving"):
            bench.checkpointed(3)

    def test_a_learners_updates_count_as_far_as_the_next_one_started(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=4, batch=1))
        bench.fence(0)
        bench.ready(4, 0)
        for update in range(3):
            bench.train(update)
        bench.fence(2)
        bench.train(2)
        bench.train(3)
        bench.checkpointed(1)
        bench.fence(1)
        bench.train(1)
        for _ in range(2):  # and in a store that was rebuilt
            lineage = bench.call("lineage")
            assert lineage == Lineage(oldest=1, newest={1: 1, 2: 1, 3: 2})
            assert [v for v in itertools.starmap(Version, itertools.product(range(5), range(4))) if not lineage.refusal(v)] == [
                Version(1, 1), Version(2, 1), Version(3, 1), Version(3, 2)
            ]  # fmt: skip
            bench.core = bench.build()

    def test_a_learner_that_was_fenced_can_make_nothing_count(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=4, batch=1, evals=1))
        bench.fence(0)
        bench.ready(2, 0)
        bench.train(0)
        bench.fence(1)
        events = list(bench.log)
        with pytest.raises(Fenced, match="incarnation 1 is not the newest"):
            bench.call("checkpointed", 1, learner=1)
        with pytest.raises(Fenced):
            bench.request_eval(Version(1, 1))
        assert bench.log == events
        bench.checkpointed(1)


def test_a_snapshot_holds_nothing_that_the_log_does_not(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan())
    bench.closes = lambda: True
    context = bench.core.context
    context.record(ev.GroupReserved(0, "train", 0, 0, 2, 0, "gen", 1))

    def fails_halfway() -> None:
        with context.recording():
            context.record(ev.GroupReserved(1, "train", 1, 0, 2, 0, "gen", 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_halfway()  # another call of the same turn
    context.write()
    assert bench.core.ledger.reserved == 2
    assert [event.group for event in bench.log] == [0]
    assert bench.build().ledger.reserved == 1


class TestEnd:
    def test_the_last_batch_is_partial_once_nothing_else_can_come(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=1, batch=2, size=3, epochs=1))
        bench.fence(0)
        bench.ready(2, 0)
        (last,) = bench.reserve(9, 0).tickets
        bench.train(0)
        bench.submit(last, 1)
        assert not bench.lease_batch(1, 1).groups
        bench.score(last, 1.0, 1.0)
        assert bench.train(1) == (last.group,)
        assert bench.lease_batch(1, 2).ended
        assert not bench.reserve(1, 2).ended  # a last evaluation may still come
        bench.finish()
        assert bench.reserve(1, 2).ended

    def test_finish_settles_everything_and_refuses_what_comes_late(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=1, batch=1))
        bench.fence(0)
        bench.ready(1, 0)
        (flying,) = bench.reserve(1, 0).tickets
        lease = bench.lease_batch(1, 0)
        bench.finish()
        counts = bench.core.ledger.counts()
        assert (counts.evicted, counts.unused, counts.pending) == (0, 2, 0)
        assert bench.submit(flying, 0) == 0
        assert bench.lease_batch(1, 0).ended
        assert bench.reserve(1, 0, held=[flying.group]).cancelled == (flying.group,)
        with pytest.raises(Closed):
            bench.commit(lease.lease, Version(1, 1), {})

    def test_what_is_left_over_is_drawn_first_when_the_run_goes_on(self, fakes: SimpleNamespace) -> None:
        bench = fakes.Bench(fakes.plan(max_lag=3, batch=2, size=8, epochs=1))
        bench.fence(0)
        bench.ready(2, 0)
        bench.train(0)
        (failed,) = bench.reserve(1, 1, "fails").tickets
        (ready,) = bench.ready(1, 1)
        (flying,) = bench.reserve(1, 1, "slow").tickets
        bench.submit(failed, 1)
        bench.score(failed, None, None)
        bench.finish()
        bench.core = bench.build()
        bench.fence(1)  # for more updates than it had
        drawn = bench.reserve(9, 1, "new").tickets
        assert [t.prompt.row for t in drawn] == [103, 104, 102, 105, 106, 107]
        assert [t.seeds for t in drawn[:2]] == [ready.seeds, flying.seeds], "the same work again"
        assert drawn[2].seeds != failed.seeds, "its second try"
        assert bench.core.context.exhausted()


def test_records_are_told_again_to_a_driver_that_starts_anew(fakes: SimpleNamespace) -> None:
    """And which updates are settled only with the last of them: before that a later record may be of the same update."""
    bench = fakes.Bench(fakes.plan(batch=1))
    bench.fence(0)
    for update in range(300):
        bench.ready(1, update)
        bench.train(update)
        bench.checkpointed(max(0, update - 3))
    told = [bench.report(0), bench.report(256)]
    assert [(len(report.records), report.settled) for report in told] == [(256, 0), (44, 296)]
    assert bench.report(290).records == told[1].records[-10:]
    bench.closes = lambda: True
    bench.core = bench.build()  # from a snapshot with all records
    bench.report(290)
    bench.ready(1, 300)  # and one with the last ten
    bench.core = bench.build()
    assert [len(bench.core.ledger.records), bench.core.ledger.noted] == [10, 300]
    assert [bench.report(0).records, bench.report(256).records] == [report.records for report in told]


def test_lengths_of_dispatched_and_trained(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=1))
    bench.fence(0)
    a, b = bench.reserve(2, 0).tickets
    bench.submit(a, 0, 0)
    bench.submit(b, 0, 0, 0, 0)
    bench.score(a, 1.0, 0.0)
    bench.train(0)
    gauges = bench.report(0).gauges
    assert gauges["length/dispatched_mean"] == 3.0
    assert gauges["length/trained_mean"] == 2.0
    bench.fence(0)
    assert bench.report(0).gauges["length/trained_mean"] == 0.0


def test_groups_that_never_give_anything_to_train_on_end_the_run(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, keep=keep_varied))
    bench.fence(0)
    bench.core.ledger.last_error = "ValueError: no number"
    for _ in range(1023):
        (ticket,) = bench.reserve(1, 0).tickets
        bench.submit(ticket, 0)
        bench.score(ticket, 1.0, 1.0)
    assert bench.lease_batch(1, 0).waiting_for
    (ticket,) = bench.reserve(1, 0).tickets
    bench.submit(ticket, 0)
    bench.score(ticket, 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"1024 groups since .* to train on, 0 did; .* filtered 1024\): .* ValueError: no"):
        bench.lease_batch(1, 0)
    assert bench.core.context.broken is None
    bench.fence(0)  # a resume, after the reward was mended, starts counting anew
    assert bench.lease_batch(2, 0).waiting_for


def test_the_cap_on_empty_batches_is_a_setting_and_every_ready_group_allows_for_as_many_again(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=9, batch=2, keep=keep_varied, max_empty_batches=3))
    bench.fence(0)

    def group(*rewards: float) -> None:
        (ticket,) = bench.reserve(1, 0).tickets
        bench.submit(ticket, 0)
        bench.score(ticket, *rewards)

    group(0.0, 1.0)  # ready: one of the two that make a batch
    for _ in range(11):
        group(1.0, 1.0)
    assert bench.lease_batch(1, 0).waiting_for  # 11 < 3 batches · 2 groups · (1 + 1 ready)
    group(0.0, 1.0)
    bench.train(0)
    for _ in range(5):
        group(1.0, 1.0)
    assert bench.lease_batch(1, 1).waiting_for  # a batch was trained: counted anew
    group(1.0, 1.0)
    with pytest.raises(
        ConfigError, match=r"6 groups since the last batch .* 0 did; 6 in a row end the run \(sampling\.max_empty_batches=3;"
    ):
        bench.lease_batch(1, 1)


def test_a_few_ready_groups_do_not_keep_a_fruitless_run_alive(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=9, batch=2, keep=keep_varied, max_empty_batches=1))
    bench.fence(0)
    for rewards in [(0.0, 1.0), *[(1.0, 1.0)] * 4]:
        (ticket,) = bench.reserve(1, 0).tickets
        bench.submit(ticket, 0)
        bench.score(ticket, *rewards)
    with pytest.raises(ConfigError, match=r"4 groups since the last batch gave nothing to train on, 1 did"):
        bench.lease_batch(1, 0)


def test_a_rollout_masked_whole_does_not_count_as_trained_length(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=1))
    bench.fence(0)
    (half,) = bench.reserve(1, 0).tickets
    bench.core.ledger.committed = 2  # only their age matters here
    bench.submit(half, 0, rollouts=[0])
    bench.submit(half, 0, 1, rollouts=[1])
    bench.score(half, 1.0, 1.0)
    bench.train(2)
    lengths = bench.core.ledger.lengths
    assert (lengths.dispatched, lengths.trained) == (2, 1)


def test_nothing_is_deleted_before_the_log_on_the_disk_says_that_no_checkpoint_needs_it(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1))
    bench.fence(0)
    bench.ready(1, 0)
    bench.train(0)
    bench.checkpointed(1)
    assert bench.core.context.log.truncated_after == CheckpointRetained(1)


def test_a_learners_incarnation_is_on_the_disk_before_it_has_one(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan())
    bench.fence(0)
    assert isinstance(bench.core.context.log.synced, LearnerFenced)


def test_what_is_due_goes_before_what_was_excused(fakes: SimpleNamespace) -> None:
    """The share is used up: if the excused group went first, the due one would be late, and nothing could be granted."""
    bench = fakes.Bench(fakes.plan(max_lag=2, batch=1, size=40, masked=0.34))
    bench.fence(0)
    (late,) = bench.reserve(1, 0, "slow").tickets
    bench.ready(1, 0)
    bench.train(0)
    (due,) = bench.reserve(1, 1, "slow", held=[late.group]).tickets
    for update in (1, 2):
        bench.ready(1, update)
        bench.train(update)
    assert bench.core.ledger.excused == 1
    for ticket, updates in ((late, (0, 3)), (due, (1,))):
        bench.submit(ticket, *updates)
        bench.score(ticket, 1.0, 0.0)
    assert [bench.train(3), bench.train(4)] == [(due.group,), (late.group,)]


def test_a_commit_says_how_the_episodes_of_its_groups_went(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=1, n=2))
    bench.fence(0)
    (ticket,) = bench.reserve(1, 0).tickets
    bench.submit(ticket, 0, rollouts=[0], figures={"turns": 3.0, "stop/done": 1.0})
    bench.submit(ticket, 0, rollouts=[1], figures={"turns": 1.0, "stop/deadline": 1.0})
    bench.score(ticket, 1.0, None)
    bench.train(0)
    (record,) = bench.report(0).records
    assert (record.metrics["num_turns/mean"], record.metrics["num_turns/max"]) == (2.0, 3.0)
    assert (record.metrics["episode/status/ok"], record.metrics["episode/status/invalid"]) == (0.5, 0.5)
    assert record.metrics["episode/stop/deadline"] == 0.5  # which was not trained
    again = fakes.Bench(bench.plan)
    again.log.extend(bench.log)
    assert again.build().ledger.commits[1].groups[0].rollouts[0].figures == {"turns": 3.0, "stop/done": 1.0}


def test_a_commit_of_single_answers_has_the_learners_metrics_alone(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=1))
    bench.fence(0)
    bench.ready(1, 0)
    bench.train(0)
    (record,) = bench.report(0).records
    assert record.metrics == {"loss": 1.0}
