"""A group's greedy rollout: generated and scored with the others, compared with, never trained."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.replay.log.rows import TrainScore
from asyncrl.replay.plan import keep_varied
from asyncrl.types import Key, Version


def test_a_group_with_its_baseline_is_one_reservation(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=2, n=2, baseline=True))
    a, b = bench.reserve(9, 0).tickets  # the bound counts groups: two, whatever is in them
    assert (a.rollouts, a.baseline) == ((0, 1, 2), 2)
    assert a.sampling == fakes.SAMPLING
    assert len({*a.seeds, *b.seeds}) == 6
    assert bench.core.ledger.counts().reserved == 2
    plain = fakes.Bench(fakes.plan(max_lag=0, batch=2, n=2)).reserve(1, 0).tickets[0]
    assert (plain.baseline, plain.seeds) == (None, a.seeds[:2])  # the sampled ones are as without it


def test_the_learner_gets_the_sampled_rollouts_with_what_the_baseline_earned(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, n=2, baseline=True))
    bench.fence(0)
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0)
    bench.scored(0, [fakes.score(a, i, r) for i, r in ((0, 1.0), (1, 0.0))])
    assert bench.lease_batch(1, 0).waiting_for == "ready groups"  # without its baseline it is not complete
    bench.scored(0, [fakes.score(a, 2, 0.25, [0.5])], bench.rows)
    lease = bench.lease_batch(1, 0)
    expected = [(0, TrainScore(1.0, {}, 0.75)), (1, TrainScore(0.0, {}, 0.75))]
    assert bench.ok_rows(1, lease.groups) == expected
    before = bench.core.ledger
    bench.core = bench.build()
    assert bench.core.ledger == before
    assert bench.ok_rows(1, lease.groups) == expected


def test_a_batch_is_retrained_against_the_same_baseline(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, n=2, baseline=True))
    bench.fence(0)
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0)
    bench.score(a, 1.0, 0.0, 0.5)
    lease = bench.lease_batch(1, 0)
    rows = bench.ok_rows(1, lease.groups)
    assert bench.train(0) == (a.group,)
    bench.core = bench.build()
    bench.fence(0)
    again = bench.lease_batch(2, 0)
    assert again.replayed
    assert bench.ok_rows(2, again.groups) == rows


@pytest.mark.parametrize(
    ("rewards", "outcome"),
    [
        ((1.0, 0.0, 0.5), None),
        ((1.0, 1.0, 0.0), "filtered"),  # `keep` must not see the baseline, which differs
        ((1.0, 0.0, 1.0), None),  # nor be swayed by one that is equal
        ((1.0, None, 0.0), "failed"),  # min_valid=2: the baseline is no substitute
        ((1.0, 0.0, None), "failed"),  # and not dispensable
    ],
)
def test_keep_and_min_valid_are_about_the_sampled_ones(
    fakes: SimpleNamespace, rewards: tuple[float | None, ...], outcome: str | None
) -> None:
    seen: list[Any] = []

    def keep(found: Any) -> bool:
        seen.append(list(found))
        return keep_varied(found)

    bench = fakes.Bench(fakes.plan(n=2, min_valid=2, baseline=True, keep=keep))
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0)
    bench.score(a, *rewards)
    ended = [name for name in ("filtered", "failed") if getattr(bench.core.ledger.counts(), name)]
    assert ended == ([outcome] if outcome else [])
    assert seen == ([] if outcome == "failed" else [[1.0, rewards[1]]])
    assert len(bench.core.ledger.retries) == (outcome == "failed")


def test_a_lost_baseline_is_generated_again_alone(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(n=2, baseline=True))
    (a,) = bench.reserve(1, 0, "dies").tickets
    bench.submit(a, 0, rollouts=[0, 1])
    bench.core.holders.arrive(Key("dies", 2, 1), [])
    (again,) = bench.reserve(1, 0, "heir").tickets
    assert (again.group, again.rollouts, again.baseline, again.attempt) == (a.group, (2,), 2, 1)
    assert again.seeds == a.seeds[2:]
    assert bench.submit(a, 0, rollouts=[2]) == 0  # the late first attempt
    assert bench.submit(again, 0) == 1
    assert bench.submit(again, 0) == 0


def test_a_baseline_has_no_lag(fakes: SimpleNamespace) -> None:
    """Its tokens come from update 0; those that are trained from update 2."""
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, n=1, on_stale="drop", baseline=True))
    bench.fence(0)
    (a,) = bench.reserve(1, 0).tickets
    bench.core.ledger.committed = 2  # only their age matters here
    bench.submit(a, 2, 2, 2, rollouts=[0])
    bench.submit(a, 0, 0, rollouts=[1])
    bench.score(a, 1.0, 0.0)
    assert bench.core.ledger.groups[a.group].oldest() == bench.core.ledger.groups[a.group].newest() == 2
    assert bench.lease_batch(1, 2).groups == (a.group,)
    lengths = bench.core.ledger.lengths
    assert (lengths.dispatched, lengths.dispatched_tokens) == (1, 3)  # nor a place among the lengths


def test_a_group_that_only_waits_for_its_baseline_to_fail_has_an_age(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=1, n=1, on_stale="drop", baseline=True))
    bench.fence(0)
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0, rollouts=[0], problem="finish_reason=abort")
    assert bench.lease_batch(1, 0).groups == ()
    assert bench.core.ledger.groups[a.group].oldest() == 0


def test_evaluation_has_none(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(n=2, evals=1, baseline=True))
    incarnation = bench.fence(0).incarnation
    bench.request_eval(Version(incarnation, 0))
    ticket = bench.reserve(1, 0).tickets[0]
    assert (ticket.purpose, ticket.rollouts, ticket.baseline) == ("eval", (0,), None)


def test_nobody_waits_for_a_group_with_nothing_left_to_train(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=2, batch=1, size=40, baseline=True, n=2))
    bench.fence(0)
    (ticket,) = bench.reserve(1, 0).tickets
    bench.submit(ticket, 1, rollouts=[0, 1])
    bench.call("score", 0, [fakes.score(ticket, index, None) for index in (0, 1)])
    assert bench.core.holders.deadline(bench.core.ledger.groups[ticket.group]) == math.inf
