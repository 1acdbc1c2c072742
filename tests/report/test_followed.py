"""A run as its files tell of it is the run that its leader sees."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import ActorFailed, DataError
from asyncrl.report.followed import FollowedRun, newest_error, run_end, write_end
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.report.summary import RunSummary
from asyncrl.rundir import RunDir
from asyncrl.types import GroupCounts, Record, Report, StoreReport, Version


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    paths = RunDir(tmp_path / "run").create()
    paths.recipe.write_text(json.dumps({"name": "other", "total_steps": 9}))
    return paths


def record(update: int, incarnation: int = 0, kind: Any = "step", **metrics: float) -> Record:
    figures = {"samples": 8.0, "reward/mean": update / 10, "staleness/lag_max": 2.0} | metrics
    version = Version(incarnation, update)
    return Record(sequence=100 * incarnation + 2 * update, time=1000.0 + update, kind=kind, version=version, metrics=figures)


def reports(busy_s: float) -> list[Report]:
    seconds = {"busy": busy_s, "wait:store": 1.0}
    rates = {"generator/tokens_per_s": 5.0}
    return [
        Report(name=name, role=name.partition("-")[0], seconds=seconds, gauges=rates) for name in ("learner", "generator-0")
    ]


def test_it_is_as_the_leader_has_it_also_after_a_restore(run: RunDir) -> None:
    own, log, followed = RunSummary(name="run", total_steps=9), MetricsLog(run.metrics), FollowedRun(run, since=1000.0)
    assert followed.read().starting
    for update, incarnation in ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1)):
        made = record(update, incarnation)
        log.append(made)
        log.append_actors(made.time + 0.5, update, reports(update), {"learner": 1} if incarnation else {})
        told = StoreReport(records=(made,), committed=update, counts=GroupCounts(), evals_pending=0, activity=0, gauges={})
        own.update(told, reports(update), {"learner": 1} if incarnation else {}, {})
        found = followed.read()
        assert (found.committed, found.samples, found.metrics) == (own.committed, own.samples, own.metrics)
        assert found.restarts == own.restarts
        assert found.elapsed_s == pytest.approx(update + 0.5)
        assert {n: r.seconds for n, r in found.reports.items() if n != "store"} == {
            n: r.seconds for n, r in own.reports.items() if n != "store"
        }
        assert found.reports["learner"].gauges == {"generator/tokens_per_s": 5.0}
    log.append_actors(1004.0, 3, reports(9.0)[:1])
    assert sorted(followed.read().reports) == ["learner", "store"], "one has left"
    assert [step.version.incarnation for step in found.steps.values()] == [0, 1, 1]
    log.append(record(3, 1, kind="eval", **{"eval/score": 0.25}))  # its sequence number was written
    log.append(Record(sequence=900, time=1009.0, kind="eval", version=Version(1, 1), metrics={"eval/score": 0.25}))
    assert followed.read().scores == [0.25]
    assert (followed.summary.committed, followed.heard) == (3, 1009.0)


def test_lines_are_taken_when_they_are_whole_and_others_passed_over(run: RunDir) -> None:
    followed = FollowedRun(run)
    line = json.dumps({"sequence": 1, "time": 5.0, "kind": "step", "step": 1, "incarnation": 0, "reward/mean": None})
    run.metrics.write_text(line[:40])
    assert followed.read().committed == 0
    run.metrics.write_text(line + "\nbroken\n")
    assert math.isnan(followed.read().metrics["reward/mean"])
    assert followed.summary.committed == 1


def test_only_the_newest_bytes_are_read_where_that_is_asked(run: RunDir) -> None:
    log = MetricsLog(run.metrics)
    for update in range(1, 10):
        log.append(record(update))
    log.close()
    size = run.metrics.stat().st_size
    found = FollowedRun(run, newest_bytes=size // 3).read()
    assert (found.committed, sorted(found.steps)[0] in (7, 8)) == (9, True)
    assert sorted(FollowedRun(run, newest_bytes=10 * size).read().steps) == list(range(1, 10))


def test_what_is_not_there_is_nothing(run: RunDir) -> None:
    assert (run_end(run), newest_error(run)) == (None, "")
    (run.logs / "generator-0.error").write_text("Traceback\n  in f\nValueError: no\n")
    assert newest_error(run) == "generator-0: ValueError: no"
    run.ended.write_text("{")
    assert run_end(run) is None


ENDS = [(None, 0), (KeyboardInterrupt("saved"), 130), (DataError("no"), 2), (ActorFailed("hf_0123456789abcdefXYZ"), 1)]


@pytest.mark.parametrize(("error", "status"), ENDS)
def test_how_it_ended_is_said_to_whoever_asks_later(run: RunDir, error: BaseException | None, status: int) -> None:
    run.checkpoint(4).mkdir()
    write_end(run, 5, error)
    end = run_end(run)
    assert end is not None
    assert (end.status, end.steps, end.checkpoint) == (status, 5, str(run.checkpoint(4)))
    assert "hf_" not in end.error
