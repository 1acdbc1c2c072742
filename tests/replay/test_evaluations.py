from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from asyncrl.errors import ConfigError, Fenced
from asyncrl.replay.plan import EvalSetting
from asyncrl.report.scores import Scored
from asyncrl.types import Key, Sampling, Version


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


def lengths(responses: Sequence[Scored]) -> dict[str, float]:
    return {"longest": max(one.length for one in responses), "of": float(len(responses))}


def odd_ones(responses: Sequence[Scored]) -> dict[str, float]:
    """Says something of some prompts only, and looks at texts."""
    one = responses[0]
    assert one.finish_reason == "stop"
    assert isinstance(one.prompt + one.response, str)
    return {"odd": float(one.ground_truth == "truth")} if one.data_source == "odd" else {}


def test_several_settings_in_one_pass_and_metrics_of_the_users_own(fakes: SimpleNamespace) -> None:
    sampled = EvalSetting("sampled", Sampling(temperature=0.6, top_p=0.9, top_k=3, max_tokens=8, stop_token_ids=(0,)), 2)
    bench = bench_with_evals(fakes, also=(sampled,), metrics=(lengths, odd_ones))
    bench.request_eval(Version(1, 0))
    tickets = eval_tickets(bench, 9, 0)
    assert [(t.prompt.row, len(t.rollouts), t.sampling.temperature) for t in tickets] == [
        *((100 + i, 1, 1.0) for i in range(3)),
        *((100 + i, 2, 0.6) for i in range(3)),
    ]
    assert len({seed for ticket in tickets for seed in ticket.seeds}) == 9
    for place, ticket in enumerate(tickets):
        bench.submit(ticket, *[0] * (place + 1))
        assert not bench.report(0).records
        bench.score(ticket, *((0.5,) if place < 3 else (0.0, float(place == 4))))
    (record,) = bench.report(0).records
    assert (record.metrics["eval/score"], record.metrics["eval/count"]) == (0.5, 3)
    assert record.metrics["eval/metric/of"] == 1
    found = {name.removeprefix("eval/sampled/"): value for name, value in record.metrics.items() if "sampled" in name}
    assert (found["score"], found["count"], found["score/odd"]) == (pytest.approx(1 / 6), 6, 0.5)
    assert (found["pass@1"], found["pass@2"]) == (pytest.approx(1 / 6), pytest.approx(1 / 3))
    assert found["metric/of"] == 2
    assert "pass@1" not in record.metrics


def test_a_metric_that_fails_costs_its_figures_and_not_the_run(
    fakes: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    bench = bench_with_evals(fakes, metrics=(lambda responses: {"x": 1 / 0},))
    bench.request_eval(Version(1, 0))
    for ticket in eval_tickets(bench, 3, 0):
        bench.submit(ticket, 0)
        bench.score(ticket, 1.0)
    (record,) = bench.report(0).records
    assert record.metrics["eval/score"] == 1
    assert not [name for name in record.metrics if "metric" in name]
    assert "evaluation.metrics: <lambda> failed: ZeroDivisionError" in caplog.text


EPISODE = {"turns": 2.0, "tokens": 3.0, "stop/done": 1.0}


def test_episodes_go_on_with_newer_weights_and_say_with_which(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes, pinned=False)
    bench.request_eval(Version(1, 1))
    assert eval_tickets(bench, 3, 0, "old") == []
    (first,) = eval_tickets(bench, 1, 1, "a")
    second, third = eval_tickets(bench, 3, 3, "b")
    assert [(t.prompt.row, t.pinned) for t in (first, second, third)] == [(100 + i, None) for i in range(3)]
    assert bench.submit(first, 1, 1, 1, 2, 2, figures=EPISODE) == 1  # swapped in the middle of it
    assert bench.submit(second, 3, 3, 3, figures=EPISODE | {"turns": 4.0}) == 1
    assert bench.submit(third, 0, 0, problem="late", figures={"turns": 0.0, "tokens": 0.0, "stop/deadline": 1.0}) == 1
    for ticket in (first, second):
        bench.score(ticket, 1.0)
    (record,) = bench.report(0).records
    assert record.version == Version(1, 1)  # that it was asked for
    found = record.metrics
    assert (found["eval/oldest_update"], found["eval/newest_update"]) == (1, 3)
    assert (found["eval/num_turns/mean"], found["eval/num_turns/max"]) == (2.0, 4.0)
    assert (found["eval/length"], found["eval/invalid"]) == (2.0, 1)  # tokens that the policy chose
    assert (found["eval/episode/stop/done"], found["eval/episode/stop/deadline"]) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )


def test_an_evaluation_of_episodes_begins_with_the_weights_that_are_there(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes, pinned=False)
    bench.request_eval(Version(1, 1))
    assert len(eval_tickets(bench, 3, 2, "a")) == 3
    assert bench.core.ledger.round.version == Version(1, 2)


def test_what_a_restore_undid_is_in_no_evaluation_of_episodes(fakes: SimpleNamespace) -> None:
    bench = bench_with_evals(fakes, pinned=False)
    bench.request_eval(Version(1, 3))
    done, _, _ = undone = eval_tickets(bench, 3, 3, "a")
    bench.submit(done, 3, figures=EPISODE)
    bench.fence(0)
    again = eval_tickets(bench, 3, 1, "b")
    assert [t.prompt.row for t in again] == [t.prompt.row for t in undone]
    assert bench.core.ledger.round.version == Version(2, 1)
    assert bench.submit(undone[1], 3, figures=EPISODE) == 0
    assert set(bench.reserve(0, 3, "a", held=[t.group for t in undone]).cancelled) == {t.group for t in undone}


def test_an_episode_that_ends_with_weights_of_a_restored_learner_is_in_no_evaluation_of_the_one_before(
    fakes: SimpleNamespace,
) -> None:
    """Its generator swapped in the middle of it, and has had nothing to ask the store since."""
    bench = bench_with_evals(fakes, pinned=False)
    bench.request_eval(Version(1, 3))
    first, second, third = eval_tickets(bench, 3, 3, "a")
    assert bench.submit(first, 3, figures=EPISODE) == 1
    bench.fence(0)
    assert eval_tickets(bench, 0, 1, "a", held=(second.group, third.group)) == []  # no slot is free
    assert bench.submit(second, 3, 1, figures=EPISODE) == 0
    again = eval_tickets(bench, 3, 1, "a", held=(third.group,))
    assert [t.prompt.row for t in again] == [t.prompt.row for t in (first, second, third)]
    for ticket in again:
        assert bench.submit(ticket, 1, figures=EPISODE) == 1
        bench.score(ticket, 1.0)
    (record,) = bench.report(0).records
    assert (record.version, record.metrics["eval/newest_update"]) == (Version(2, 1), 1)
