"""Prompts that whoever works on them dies of: they are found, given up and named; their neighbours are not."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl.replay.log import events as ev
from asyncrl.types import Version


def forget(bench: Any, worker: str, incarnation: int = 1) -> None:
    """As the supervisor, when it has seen the actor die."""
    bench.call("forget", worker, incarnation, worker="supervisor")


class Fleet:
    """Generators of `slots` groups each, which the supervisor replaces when they die: of a prompt in `deadly` rows they do."""

    def __init__(self, bench: Any, rng: random.Random, count: int, slots: int, deadly: set[int]) -> None:
        self.bench, self.rng, self.slots, self.deadly = bench, rng, slots, deadly
        self.held: dict[str, dict[int, Any]] = {f"g{i}": {} for i in range(count)}
        self.incarnation = dict.fromkeys(self.held, 1)
        self.deaths = 0

    def die(self, name: str) -> None:
        forget(self.bench, name, self.incarnation[name])
        self.incarnation[name] += 1
        self.held[name] = {}
        self.deaths += 1

    def step(self, name: str, update: int) -> None:
        held = self.held[name]
        got = self.bench.reserve(self.slots - len(held), update, name, list(held), self.incarnation[name])
        for group in got.cancelled:
            held.pop(group, None)
        held |= {ticket.group: ticket for ticket in got.tickets}
        if any(ticket.prompt.row in self.deadly for ticket in held.values()):
            if self.rng.random() < 0.7:
                self.die(name)
            return
        for ticket in [ticket for ticket in held.values() if self.rng.random() < 0.5]:
            self.bench.submit(ticket, update)
            self.bench.score(ticket, *[1.0] * len(ticket.rollouts))
            del held[ticket.group]


def run_to_the_end(bench: Any, fleet: Fleet) -> None:
    incarnation = bench.fence(0).incarnation
    for _ in range(2000):
        update = bench.core.ledger.committed
        fleet.step(fleet.rng.choice(list(fleet.held)), update)
        lease = bench.lease_batch(incarnation, update)
        if lease.ended:
            return
        if lease.groups:
            bench.commit(lease.lease, Version(incarnation, update + 1), {})
    raise AssertionError(f"no end: {bench.state()}")


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 3),
    slots=st.integers(1, 8),
    deadly=st.sets(st.integers(100, 115), max_size=3),
    max_attempts=st.integers(1, 4),
    on_stale=st.sampled_from(["mask", "wait"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_deadly_prompts_are_given_up(
    fakes: SimpleNamespace, seed: int, count: int, slots: int, deadly: set[int], max_attempts: int, on_stale: str
) -> None:
    plan = fakes.plan(max_lag=3, batch=4, size=16, epochs=1, shuffle=True, on_stale=on_stale, max_attempts=max_attempts)
    bench = fakes.Bench(plan)
    fleet = Fleet(bench, random.Random(seed), count, slots, deadly)
    run_to_the_end(bench, fleet)
    counts, messages = bench.core.ledger.counts(), bench.report(0).given_up
    named = {int(message.split("row ")[1].split()[0]) for message in messages}
    assert deadly <= named
    if len(deadly) == 1:
        assert named == deadly, "and nobody else"
    assert counts.failed == len(named) == len(messages)
    assert counts.trained == 16 - counts.failed
    assert fleet.deaths <= len(named) * max(3, max_attempts)
    restarted = bench.build()
    assert restarted.ledger == bench.core.ledger


def test_a_deadly_prompt_alone_is_tried_max_attempts_times_and_named(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, max_attempts=3))
    for life in (1, 2, 3):
        (ticket,) = bench.reserve(1, 0, incarnation=life).tickets
        assert (ticket.prompt.row, ticket.attempt) == (100, life - 1)
        forget(bench, "gen", life)
    (message,) = bench.report(0).given_up
    assert "the prompt in row 100 of the data (position 0, group 0) was in flight when 3 generators died" in message
    assert "sampling.max_attempts=3" in message
    assert bench.core.ledger.counts().failed == 1
    assert bench.reserve(1, 0, incarnation=4).tickets[0].prompt.row == 101
    assert bench.build().ledger == bench.core.ledger


def test_a_worker_that_dies_again_before_its_groups_were_reissued_adds_nothing(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1))
    bench.reserve(1, 0)
    for life in range(1, 6):  # the others die while they start
        forget(bench, "gen", life)
    assert bench.core.ledger.deaths_of(("train", 0)) == 1
    bench.core = bench.build()
    assert bench.reserve(1, 0, "other").tickets[0].attempt == 1, "a restarted store need not wait for a lease that nobody holds"


@pytest.mark.parametrize("how", ["a newer incarnation", "silence", "no longer named"])
def test_what_is_lost_without_a_death_is_nobodys_fault(fakes: SimpleNamespace, how: str) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, max_attempts=1))
    for life in range(1, 9):
        (ticket,) = bench.reserve(1, 0, incarnation=life if how == "a newer incarnation" else 1).tickets
        if how == "silence":
            bench.sleep(31)
    assert ticket.attempt == 7
    assert bench.core.ledger.counts().failed == 0


def test_coincidences_take_no_neighbour(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=3, batch=2, max_attempts=3))
    for life in (1, 2):
        assert len(bench.reserve(8, 0, incarnation=life).tickets) == 8
        forget(bench, "gen", life)
    for place in range(8):  # twice together: from now on one at a time, beside others
        (ticket,) = bench.reserve(8, 0, incarnation=3).tickets
        assert (ticket.prompt.row, ticket.attempt) == (100 + place, 2)
        assert bench.reserve(8, 0, incarnation=3, held=[ticket.group]).tickets == ()
        bench.submit(ticket, 0)
    assert not bench.core.ledger.deaths
    assert bench.report(0).given_up == ()


def test_a_prompt_that_hangs_its_holder_is_counted_when_the_holder_is_known_to_be_dead(fakes: SimpleNamespace) -> None:
    """Its group went to others when the lease ran out, before the supervisor gave the holder up."""
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, max_attempts=2))
    bench.reserve(1, 0, "a")
    bench.sleep(31)
    bench.reserve(1, 0, "b")
    bench.sleep(31)
    (ticket,) = bench.reserve(1, 0, "c").tickets
    forget(bench, "a")
    assert bench.core.ledger.deaths_of(("train", 0)) == 1
    assert bench.reserve(0, 0, "c", held=[ticket.group]).cancelled == (), "whoever works on it goes on"
    forget(bench, "b")
    assert bench.core.ledger.counts().failed == 1
    assert bench.reserve(0, 0, "c", held=[ticket.group]).cancelled == (ticket.group,)
    assert bench.submit(ticket, 0) == 0


def test_a_holder_that_was_only_slow_counts_for_nothing(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=0, batch=1, max_attempts=1))
    (mine,) = bench.reserve(1, 0, "slow").tickets
    bench.sleep(31)
    bench.reserve(1, 0, "other")
    assert bench.reserve(0, 0, "slow", held=[mine.group]).cancelled == (mine.group,)
    forget(bench, "slow")  # of something else, later
    assert not bench.core.ledger.deaths


class TestEvaluation:
    def bench(self, fakes: SimpleNamespace, evals: int) -> Any:
        bench = fakes.Bench(fakes.plan(evals=evals, batch=1, max_lag=9, max_attempts=2))
        bench.fence(0)
        bench.request_eval(Version(1, 0))
        return bench

    def reserve(self, bench: Any, k: int, update: int, life: int, held: tuple[int, ...] = ()) -> list[Any]:
        return list(bench.reserve(k, update, incarnation=life, held=held).tickets)

    def test_a_deadly_held_out_prompt_counts_as_invalid_now_and_later(self, fakes: SimpleNamespace) -> None:
        bench = self.bench(fakes, evals=2)
        for life in (1, 2):
            (first, *_) = self.reserve(bench, 1, 0, life)
            assert first.purpose == "eval"
            forget(bench, "gen", life)
        assert bench.submit(first, 0) == 0
        assert "held-out prompt in row 100" in bench.report(0).given_up[0]
        (second,) = self.reserve(bench, 1, 0, 3)
        bench.submit(second, 0)
        bench.score(second, 1.0)
        bench.request_eval(Version(1, 0))
        (again,) = self.reserve(bench, 1, 0, 3)
        assert again.prompt.row == second.prompt.row, "nobody gets the deadly one"
        bench.submit(again, 0)
        bench.score(again, 1.0)
        assert [r.metrics["eval/invalid"] for r in bench.report(0).records] == [1, 1]
        assert [r.metrics["eval/score"] for r in bench.report(0).records] == [0.5, 0.5]
        assert len(bench.report(0).given_up) == 1
        assert bench.build().ledger == bench.core.ledger

    def test_an_evaluation_of_deadly_prompts_alone_ends(self, fakes: SimpleNamespace) -> None:
        bench = self.bench(fakes, evals=1)
        for life in (1, 2):
            self.reserve(bench, 1, 0, life)
            forget(bench, "gen", life)
        bench.request_eval(Version(1, 0))
        assert self.reserve(bench, 1, 0, 3)[0].purpose == "train"
        assert [r.metrics["eval/score"] for r in bench.report(0).records] == [0.0, 0.0]

    def test_a_newer_pin_forgets_no_death(self, fakes: SimpleNamespace) -> None:
        bench = self.bench(fakes, evals=4)
        for life in (1, 2):  # with newer weights each time: the evaluation starts over
            assert len(self.reserve(bench, 4, life - 1, life)) == 4
            forget(bench, "gen", life)
        (alone, *rest) = self.reserve(bench, 4, 2, 3)
        assert alone.prompt.row == 100
        assert all(ticket.purpose == "train" for ticket in rest)
        forget(bench, "gen", 3)
        assert "held-out prompt in row 100" in bench.report(0).given_up[0]
        assert len([t for t in self.reserve(bench, 9, 2, 4) if t.purpose == "eval"]) == 3  # the others are cleared


def test_a_death_is_no_progress(fakes: SimpleNamespace) -> None:
    """The watchdog must not take a run for alive in which holders only die."""
    bench = fakes.Bench(fakes.plan())
    bench.reserve(1, 0)
    before = bench.report(0).activity
    forget(bench, "gen")
    assert isinstance(bench.log[-1], ev.HolderDied)
    assert bench.report(0).activity == before


def test_suspects_that_a_clean_end_left_over_go_one_to_a_holder_too(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=3, batch=2, max_attempts=3))
    bench.fence(0)
    for life in (1, 2):
        assert len(bench.reserve(2, 0, incarnation=life).tickets) == 2
        forget(bench, "gen", life)
    bench.finish()
    bench.fence(0)
    (ticket,) = bench.reserve(2, 0, incarnation=3).tickets
    assert ticket.prompt.row == 100
    (other,) = bench.reserve(1, 0, "another").tickets
    assert other.prompt.row == 101
