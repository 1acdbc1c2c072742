"""A reward that fails: the first failure is told, and a function that fails on all of the first samples ends the run."""

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from asyncrl.errors import ConfigError
from asyncrl.types import Score, Ticket, Version


def failed(ticket: Ticket, index: int, error: str, status: Any = "invalid") -> Score:
    return Score(group=ticket.group, rollout=index, attempt=ticket.attempt, status=status, error=error)


def fail(bench: Any, groups: int, error: str = "ValueError: no", status: Any = "invalid", update: int = 0) -> int:
    """Reserves, generates and fails so many groups, or as many as are admitted; how many."""
    for done in range(groups):
        tickets = bench.reserve(1, update).tickets
        if not tickets:
            return done
        bench.submit(tickets[0], update)
        bench.scored(0, [failed(tickets[0], i, error, status) for i in tickets[0].rollouts])
    return groups


def test_the_first_failure_is_told_with_function_and_sample(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(replace(fakes.plan(), reward="reward mine.py:f"))
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0)
    assert bench.report(0).failures.first == ""
    bench.scored(0, [fakes.score(a, 0, 1.0), failed(a, 1, "ValueError: no (mine.py:3 in f)")])
    fail(bench, 1, "another")
    assert bench.report(0).failures.first == (
        "reward mine.py:f failed on its first sample (group 0, rollout 1, row 100 of the data): "
        "invalid: ValueError: no (mine.py:3 in f)"
    )


def test_a_reward_that_fails_on_a_batch_of_first_samples_ends_the_run(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=5, n=4, size=64))  # 20 samples
    bench.fence(0)
    assert fail(bench, 4) == 4
    assert bench.report(0).failures.broken == ""
    assert fail(bench, 1) == 1
    assert bench.report(0).failures.broken.startswith(
        "the reward failed on its first sample (group 0, rollout 0, row 100 of the data): invalid: ValueError: no; "
        "none of the first 20 samples has a reward: there is nothing to train on; fix the function"
    )


def test_nothing_more_is_generated_while_what_is_under_way_suffices_to_tell(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=4, n=4, size=64, max_lag=8))  # 16 samples
    a, b, c = bench.reserve(3, 0).tickets
    bench.submit(a, 0)
    bench.scored(0, [failed(a, i, "no") for i in a.rollouts])
    (d,) = bench.reserve(9, 0, held=[b.group, c.group]).tickets  # 4 failed, 8 under way: room for the 4 that are missing
    reply = bench.reserve(1, 0, held=[b.group, c.group, d.group])
    assert (reply.tickets, reply.waiting_for) == ((), "first reward")
    bench.submit(b, 0)
    bench.scored(0, [failed(b, 0, "no"), fakes.score(b, 1, 0.0)])  # one that works
    assert len(bench.reserve(9, 0, held=[c.group, d.group]).tickets) == 9


def test_what_is_lost_while_nothing_new_is_admitted_is_generated_again(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=4, n=4, size=64, max_lag=8))
    a, b, c, d = bench.reserve(4, 0).tickets
    bench.submit(a, 0)
    bench.scored(0, [failed(a, i, "no") for i in a.rollouts])
    assert [ticket.group for ticket in bench.reserve(9, 0, held=[b.group, c.group]).tickets] == [d.group]


def test_slow_failures_end_the_run_after_a_minute(fakes: SimpleNamespace) -> None:
    """A reward that hangs costs a deadline for each sample."""
    bench = fakes.Bench(fakes.plan(batch=64, n=8, size=64, lease_s=1000.0))
    bench.fence(0)
    assert fail(bench, 2, "no score within reward.deadline_s=10", "timeout") == 2  # 16 of 512
    bench.clock.now += 59.0
    assert bench.report(0).failures.broken == ""
    bench.clock.now += 1.0
    assert "timeout: no score within reward.deadline_s=10; none of the first 16" in bench.report(0).failures.broken


def test_data_that_end_before_are_all_there_is(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=2, n=1, size=4, epochs=1, max_attempts=1))
    bench.fence(0)
    assert fail(bench, 3) == 3
    assert bench.report(0).failures.broken == ""
    assert fail(bench, 1) == 1
    assert "none of the first 4 samples has a reward" in bench.report(0).failures.broken


def test_rewards_of_before_a_restart_prove_that_the_function_works(fakes: SimpleNamespace) -> None:
    """At the end of the data the first score of a new store may be the last of all."""
    bench = fakes.Bench(fakes.plan(size=2, epochs=1, batch=2, n=2))
    incarnation = bench.fence(0).incarnation
    first, second = bench.reserve(2, 0).tickets
    for ticket in (first, second):
        bench.submit(ticket, 0)
    bench.scored(0, [fakes.score(first, 0, 1.0), fakes.score(first, 1, 1.0), fakes.score(second, 0, 1.0)])
    bench.core = bench.build()
    bench.scored(0, [failed(second, 1, "no")])
    assert bench.report(0).failures.broken == ""
    assert bench.lease_batch(incarnation, 0).groups


def test_who_leads_the_stages_by_hand_is_told_by_the_learner(fakes: SimpleNamespace) -> None:
    """Nothing more is generated, and no supervisor looks at the report."""
    bench = fakes.Bench(fakes.plan(batch=5, n=4, size=64, lease_s=1000.0))
    incarnation = bench.fence(0).incarnation
    assert fail(bench, 5) == 5
    assert bench.lease_batch(incarnation, 0).groups == ()
    bench.clock.now += 10.0
    with pytest.raises(ConfigError, match="none of the first 20 samples has a reward"):
        bench.lease_batch(incarnation, 0)


def test_the_setting_is_the_number(fakes: SimpleNamespace) -> None:
    plan = fakes.plan(batch=4, n=4, size=64)
    bench = fakes.Bench(replace(plan, sampling=replace(plan.sampling, max_first_failures=40)))
    bench.fence(0)
    assert fail(bench, 9) == 9
    bench.clock.now += 600.0
    assert bench.report(0).failures.broken == ""
    fail(bench, 1)
    assert "none of the first 40" in bench.report(0).failures.broken


def test_after_one_reward_failures_end_nothing_until_the_run_is_resumed(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(batch=2, n=2, size=64))
    bench.fence(0)
    bench.ready(1, 0)
    assert fail(bench, 50, "ConnectionError: the judge is down") == 50
    assert bench.report(0).failures.broken == ""
    bench.core = bench.build()  # as a resumed run does
    assert bench.report(0).failures.first == ""
    bench.fence(0)
    assert fail(bench, 8) == 8
    assert "none of the first 16" in bench.report(0).failures.broken


def test_held_out_samples_count_too(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(evals=20, lease_s=1000.0))
    incarnation = bench.fence(0).incarnation
    bench.request_eval(Version(incarnation, 0))
    tickets = bench.reserve(16, 0).tickets
    for ticket in tickets:
        bench.submit(ticket, 0)
        bench.scored(0, [failed(ticket, 0, "no")])
    assert "group 0, rollout 0, held-out row 100 of the data" in bench.report(0).failures.broken


def test_rollouts_that_were_never_scored_are_no_failures_of_the_reward(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan())
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0, problem="finish_reason=abort")
    assert bench.report(0).failures.invalid == 0


def test_an_environment_that_never_works_ends_the_run_and_is_named(fakes: SimpleNamespace) -> None:
    """Nothing is sampled in its episodes, so that no reward function sees them."""
    bench = fakes.Bench(fakes.plan(batch=8, n=2))
    for _ in range(8):
        (ticket,) = bench.reserve(1, 0).tickets
        assert not bench.report(0).failures.broken
        bench.submit(ticket, 0, problem="KeyError: 'table' (pointers.py:60 in reset)", figures={"turns": 0.0})
    failures = bench.report(0).failures
    assert failures.invalid == 16
    assert "row 100 of the data): invalid: KeyError: 'table' (pointers.py:60 in reset)" in failures.broken


def test_errors_of_a_kind_are_counted_together_and_few_kinds_are_kept(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(n=1, min_valid=1, size=64, max_lag=400))
    bench.ready(1, 0)
    for number in range(3):
        fail(bench, 1, f"ValueError: {number} is no answer to 'prompt {number}' (mine.py:3 in f)")
    fail(bench, 2, "no score within reward.deadline_s=10", "timeout")
    for number in range(200):
        fail(bench, 1, f"KeyError: {chr(97 + number // 26)}{chr(97 + number % 26)}")
    failures = bench.report(0).failures
    assert (failures.invalid, failures.timeout) == (203, 2)
    assert list(failures.errors.items())[:2] == [
        ("ValueError: 0 is no answer to 'prompt 0' (mine.py:3 in f)", 3),
        ("no score within reward.deadline_s=10", 2),
    ]
    assert len(failures.errors) == 3
    assert len(bench.core.failures._errors) == 64
