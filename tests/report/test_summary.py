"""What a run adds up to, over what its store and its actors reported."""

import random

import pytest
from msgspec.structs import replace

from asyncrl.report.summary import RunResult, RunSummary
from asyncrl.types import GroupCounts, Record, Report, RewardFailures, StoreReport, Version

COUNTS = GroupCounts(reserved=8, trained=4, filtered=1, evicted=0, failed=0, unused=2, pending=1)
FAILED = RewardFailures(invalid=3, timeout=1, first="f failed", errors={"ValueError: no": 3})


def step(sequence: int, incarnation: int, update: int, samples: int = 8, **metrics: float) -> Record:
    figures = {"samples": float(samples), **metrics}
    return Record(sequence=sequence, time=0.0, kind="step", version=Version(incarnation, update), metrics=figures)


def score(sequence: int, update: int, value: float) -> Record:
    return Record(sequence=sequence, time=0.0, kind="eval", version=Version(1, update), metrics={"eval/score": value})


def told(run: RunSummary, *records: Record, committed: int | None = None, settled: int = 0, **gauges: float) -> None:
    committed = max(record.version.update for record in records) if committed is None else committed
    store = StoreReport(
        records=records,
        committed=committed,
        counts=COUNTS,
        evals_pending=0,
        activity=0,
        gauges=gauges,
        failures=FAILED,
        settled=settled,
    )
    run.update(store, (), {}, {})


def result(run: RunSummary) -> RunResult:
    return run.result("runs/r", 1.0)


@pytest.fixture
def run():
    return RunSummary(name="r", total_steps=9)


def test_sums_and_scores(run):
    told(run, score(1, 0, 0.4), step(2, 1, 1, **{"staleness/lag_max": 2.0}), step(3, 1, 2, samples=6), committed=2)
    told(run, score(4, 2, 0.9), committed=2)
    assert (run.samples, run.committed, run.scores, run.counts) == (14, 2, [0.4, 0.9], COUNTS)
    ended = result(run)
    assert (ended.steps, ended.samples, ended.max_trained_lag, ended.first_score, ended.last_score) == (2, 14, 2, 0.4, 0.9)
    assert (ended.trained, ended.filtered, ended.evicted, ended.failed, ended.unused, ended.pending) == (4, 1, 0, 0, 2, 1)
    assert (ended.invalid, ended.timeout, ended.reward_errors) == (3, 1, {"ValueError: no": 3})


def test_before_the_first_step_there_is_no_score(run):
    assert (result(run).first_score, result(run).last_score, result(run).trained_length_ratio) == (None, None, None)


def test_steps_that_a_restore_reopened_count_once(run):
    told(run, *(step(i, 1, i, samples=8) for i in (1, 2, 3)), committed=3)
    told(run, step(4, 2, 2, samples=4), committed=2)  # restored at 1; 2 was trained again, 3 not yet
    assert run.samples == 8 + 4
    told(run, step(5, 2, 3, samples=4), committed=3)
    assert run.samples == 8 + 4 + 4


def test_nothing_is_left_of_updates_that_were_dropped(run):
    told(run, score(1, 0, 0.4), step(2, 1, 1), step(3, 1, 2, **{"staleness/lag_max": 3.0}), score(4, 2, 0.9))
    told(run, committed=1)  # the learner went back to 1, and has made nothing yet
    assert (run.samples, result(run).max_trained_lag, run.scores) == (8, 0, [0.4])


def test_steps_that_no_restore_undoes_are_only_summed_up():
    """Whatever is told, and however often a learner goes back, the figures are those of a run that keeps all."""
    rng, keeps, sums = random.Random(3), RunSummary(name="r", total_steps=9), RunSummary(name="r", total_steps=9)
    sequence = committed = settled = incarnation = 0
    for _ in range(300):
        records = []
        for _ in range(rng.randint(0, 3)):
            sequence, committed = sequence + 1, committed + 1
            figures = {"tokens/policy": 90.0, "tokens/trained": rng.randint(1, 90), "staleness/lag_mean": rng.random()}
            figures |= {"staleness/lag_max": rng.randint(0, 4), "tokens/head": 9.0, "tokens/head_trained": rng.randint(0, 9)}
            records.append(step(sequence, incarnation, committed, rng.randint(1, 9), **figures))
            if rng.random() < 0.2:
                records.append(score(sequence := sequence + 1, committed, rng.random()))
        if rng.random() < 0.1:
            incarnation, committed = incarnation + 1, rng.randint(settled, committed)
        settled = max(settled, committed - 20)
        for run in (keeps, sums):
            told(run, *records, committed=committed, settled=settled if run is sums else 0)
        assert result(sums) == approximately(result(keeps))
        assert len(sums.steps) + len(sums.evals) <= 50
    assert len(keeps.steps) > 100
    assert sums.metrics == keeps.metrics


def approximately(result: RunResult) -> RunResult:
    """Sums of floats, in another order."""
    return replace(result, mean_trained_lag=pytest.approx(result.mean_trained_lag))


def test_masked_share_weighs_steps_by_tokens(run):
    first = {"tokens/policy": 100.0, "tokens/trained": 100.0, "staleness/lag_mean": 0.0}
    second = {"tokens/policy": 300.0, "tokens/trained": 240.0, "staleness/lag_mean": 1.7}
    heads = [{"tokens/head": 20.0, "tokens/head_trained": trained} for trained in (20.0, 10.0)]
    told(run, step(1, 1, 1, **first, **heads[0]), step(2, 1, 2, **second, **heads[1]))
    assert result(run).masked_share == pytest.approx(60 / 400)
    assert result(run).masked_head_share == pytest.approx(10 / 40)
    assert result(run).mean_trained_lag == pytest.approx(240 * 1.7 / 340)


def test_what_limits_a_run_is_what_the_store_says(run):
    told(run, committed=0, **{"limit/max_lag": 0.25, "limit/reserve_ahead": 0.5, "limit/stragglers": 0.0})
    assert result(run).limited_by == {"max_lag": 0.25, "reserve_ahead": 0.5, "stragglers": 0.0}


def test_lengths_are_those_that_the_store_measured(run):
    told(run, committed=0, **{"length/dispatched_mean": 8.0, "length/trained_mean": 6.0})
    assert result(run).trained_length_ratio == 0.75


def test_utilization_leaves_the_wait_for_the_start_out(run):
    seconds = {"wait:start": 100.0, "busy": 6.0, "wait:store": 3.0, "sync": 1.0}
    run.update(None, [Report(name="learner", role="learner", seconds=seconds, gauges={})], {}, {})
    assert result(run).learner_utilization == pytest.approx(0.6)


def test_an_actor_that_says_nothing_is_known_by_what_it_said_last(run):
    first, second = (Report(name="learner", role="learner", seconds={"busy": s}, gauges={}) for s in (1.0, 2.0))
    run.update(None, [first], {"learner": 1}, {"learner": 7})
    run.update(None, [], {"learner": 1}, {"learner": 7})
    assert (run.reports, run.restarts, run.pids) == ({"learner": first}, {"learner": 1}, {"learner": 7})
    run.update(None, [second], {}, {})
    assert run.reports == {"learner": second}
