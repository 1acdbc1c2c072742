from types import SimpleNamespace

import pytest

from asyncrl.errors import ConfigError, Fenced
from asyncrl.types import Key, Version


def bench_with_evals(fakes: SimpleNamespace, **options: object) -> SimpleNamespace:
    bench = fakes.Bench(fakes.plan(evals=3, batch=1, max_lag=4, **options))
    bench.fence(0)
    return bench


def eval_tickets(bench: SimpleNamespace, k: int, update: int, worker: str = "gen", held: tuple = ()) -> list:
    return [t for t in bench.reserve(k, update, worker, held=held).tickets if t.purpose == "eval"]


def test_mean_score_with_invalid_as_zero(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    bench.request_eval(Version(1, 0))
    tickets = eval_tickets(bench, 3, 0)
    assert [(t.prompt.row, t.pinned) for t in tickets] == [(100 + i, Version(1, 0)) for i in range(3)]
    for ticket, reward, length in zip(tickets, (1.0, None, 0.5), (1, 2, 6), strict=True):
        bench.submit(ticket, *[0] * length)
        bench.score(ticket, reward)
    (record,) = bench.report(0).records
    assert (record.kind, record.version) == ("eval", Version(1, 0))
    expected = {
        "eval/score": 0.5,
        "eval/count": 3,
        "eval/invalid": 1,
        "eval/timeout": 0,
        "eval/length": 3.0,
        "eval/score/even": 0.75,
        "eval/score/odd": 0.0,
    }
    assert record.metrics == expected
    assert bench.core.ledger.counts().reserved == 0  # outside admission


def test_only_a_caller_at_the_pinned_version_is_served(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    bench.request_eval(Version(1, 2))
    assert eval_tickets(bench, 3, 1, "old") == []
    assert len(eval_tickets(bench, 2, 2, "exact")) == 2
    assert eval_tickets(bench, 3, 3, "new") == []  # "exact" lives and works at the pin


def test_rows_of_other_weights_are_not_taken(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    bench.request_eval(Version(1, 0))
    (ticket, *_) = eval_tickets(bench, 1, 0)
    assert bench.submit(ticket, 0, 1) == 0
    assert bench.submit(ticket, 0, 0) == 1


def test_the_pin_moves_when_nobody_is_left_at_it(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    bench.request_eval(Version(1, 1))
    bench.request_eval(Version(1, 2))  # replaces the first, which has not begun
    (done, lost) = eval_tickets(bench, 2, 2, "a")
    bench.submit(done, 2)
    bench.request_eval(Version(1, 3))
    bench.core.holders.arrive(Key("a", 2, 1), [])  # a restarts, with newer weights
    tickets = eval_tickets(bench, 9, 3, "a2")
    assert [(t.prompt.row, t.pinned) for t in tickets] == [(100 + i, Version(1, 3)) for i in range(3)]
    assert bench.submit(lost, 2) == 0
    assert bench.core.ledger.queued is None  # the waiting request is what runs now


def test_a_lost_ticket_is_reissued_at_the_same_version(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    bench.request_eval(Version(1, 0))
    a, b, c = eval_tickets(bench, 3, 0, "a")
    (again,) = eval_tickets(bench, 1, 0, "a", held=(b.group, c.group))
    assert (again.group, again.attempt, again.seeds) == (a.group, 1, a.seeds)


def test_the_next_request_waits_its_turn_and_the_end_waits_for_all(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    for update in (0, 1, 2):  # the second is replaced by the third once the first runs
        bench.request_eval(Version(1, update))
        if update == 0:
            first = eval_tickets(bench, 3, 0)
    bench.finish()
    assert not bench.reserve(1, 0, held=[t.group for t in first]).ended
    for ticket in first:
        bench.submit(ticket, 0)
        bench.score(ticket, 1.0)
    for ticket in eval_tickets(bench, 9, 2):
        bench.submit(ticket, 2)
        bench.score(ticket, 0.0)
    assert [(r.version.update, r.metrics["eval/score"]) for r in bench.report(0).records] == [(0, 1.0), (2, 0.0)]
    assert bench.reserve(1, 2).ended


def test_requests_that_make_no_sense(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    with pytest.raises(Fenced):
        bench.request_eval(Version(9, 0))
    bench = fakes.Bench(fakes.plan())
    with pytest.raises(ConfigError, match=r"evaluation\.files"):
        bench.request_eval(Version(0, 0))


def test_the_pin_stays_while_only_verdicts_are_missing(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes)
    bench.request_eval(Version(1, 0))
    tickets = eval_tickets(bench, 3, 0)
    for ticket in tickets:
        bench.submit(ticket, 0)
    assert eval_tickets(bench, 3, 1) == []  # the generator has moved on
    for ticket in tickets:
        bench.score(ticket, 1.0)
    (record,) = bench.report(0).records
    assert (record.version, record.metrics["eval/score"]) == (Version(1, 0), 1.0)
