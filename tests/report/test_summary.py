import json

import pytest

from asyncrl.report.summary import RunSummary
from asyncrl.rundir import RunDir
from asyncrl.types import GroupCounts, Record, Report, RunStatus, StoreReport, Version

COUNTS = GroupCounts(reserved=6, trained=4, filtered=1, evicted=0, failed=0, pending=1)


def step(sequence: int, incarnation: int, update: int, samples: int = 8, **metrics: float) -> Record:
    figures = {"samples": float(samples), **metrics}
    return Record(sequence=sequence, time=0.0, kind="step", version=Version(incarnation, update), metrics=figures)


def score(sequence: int, update: int, value: float) -> Record:
    return Record(sequence=sequence, time=0.0, kind="eval", version=Version(1, update), metrics={"eval/score": value})


def told(*records: Record, committed: int | None = None) -> RunStatus:
    committed = max(record.version.update for record in records) if committed is None else committed
    store = StoreReport(records=records, committed=committed, counts=COUNTS, evals_pending=0, activity=0, gauges={})
    return RunStatus(store=store, reports=(), restarts={}, pids={})


@pytest.fixture
def paths(tmp_path):
    return RunDir(tmp_path).create()


def test_sums_and_scores(paths):
    tally = RunSummary(paths, None)
    tally.observe(told(score(1, 0, 0.4), step(2, 1, 1, **{"staleness/lag_max": 2.0}), step(3, 1, 2, samples=6), committed=2))
    tally.observe(told(score(4, 2, 0.9), committed=2))
    assert (tally.samples, tally.max_trained_lag, tally.committed) == (14, 2, 2)
    assert (tally.first_score, tally.last_score) == (0.4, 0.9)
    assert tally.counts == COUNTS


def test_steps_that_a_restore_reopened_count_once(paths):
    tally = RunSummary(paths, None)
    tally.observe(told(*(step(i, 1, i, samples=8) for i in (1, 2, 3)), committed=3))
    tally.observe(told(step(4, 2, 2, samples=4), committed=2))  # restored at 1; 2 was trained again, 3 not yet
    assert tally.samples == 8 + 4
    tally.observe(told(step(5, 2, 3, samples=4), committed=3))
    assert tally.samples == 8 + 4 + 4


def test_nothing_is_left_of_updates_that_were_given_up(paths):
    tally = RunSummary(paths, None)
    tally.observe(told(score(1, 0, 0.4), step(2, 1, 1), step(3, 1, 2, **{"staleness/lag_max": 3.0}), score(4, 2, 0.9)))
    tally.observe(told(committed=1))  # the learner went back to 1, and has made nothing yet
    assert (tally.samples, tally.max_trained_lag, tally.scores) == (8, 0, (0.4,))


def test_masked_share_weighs_steps_by_tokens(paths):
    tally = RunSummary(paths, None)
    first = {"tokens/policy": 100.0, "tokens/trained": 100.0}
    second = {"tokens/policy": 300.0, "tokens/trained": 240.0}
    tally.observe(told(step(1, 1, 1, **first), step(2, 1, 2, **second)))
    assert tally.masked_share == pytest.approx(60 / 400)


def test_utilization_leaves_the_wait_for_the_start_out(paths):
    tally = RunSummary(paths, None)
    seconds = {"wait:start": 100.0, "busy": 6.0, "wait:store": 3.0, "sync": 1.0}
    tally.observe(
        RunStatus(
            store=None, reports=(Report(name="learner", role="learner", seconds=seconds, gauges={}),), restarts={}, pids={}
        )
    )
    assert tally.learner_utilization == pytest.approx(0.6)


def test_every_record_is_in_the_metrics_file_once_across_a_resume(paths):
    records = [step(1, 1, 1), score(2, 1, 0.5)]
    first = RunSummary(paths, None)
    first.observe(told(*records))
    first.close()
    second = RunSummary(paths, None)
    second.observe(told(*records, step(3, 2, 2)))
    second.close()
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [line["sequence"] for line in lines if line["kind"] in ("step", "eval")] == [1, 2, 3]
    assert second.samples == 16
