"""metrics.jsonl: every record once, whatever died in between; TensorBoard gets the same figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.errors import DataError, DiskFull
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.report.trackers import RunFacts, Trackers
from asyncrl.types import Record, Report, Version


def trackers(folder: Path) -> Trackers:
    return Trackers(["tensorboard"], RunFacts(name="run", run_dir=str(folder)))


def record(sequence: int, update: int = 0, incarnation: int = 0, **metrics: float) -> Record:
    return Record(
        sequence=sequence,
        time=100.0 + sequence,
        kind="step",
        version=Version(incarnation, update),
        metrics=metrics or {"x": 1.0},
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_one_flat_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers(tmp_path))
    assert log.append(Record(sequence=1, time=5.0, kind="eval", version=Version(2, 30), metrics={"eval/score": 0.5}))
    # On disk before close: a killed driver loses nothing it has taken.
    assert lines(tmp_path / "metrics.jsonl") == [
        {"sequence": 1, "time": 5.0, "kind": "eval", "step": 30, "incarnation": 2, "eval/score": 0.5}
    ]
    log.append(record(2, **{"actor/grad_norm": float("nan")}))
    assert lines(tmp_path / "metrics.jsonl")[1]["actor/grad_norm"] is None
    log.close()
    log.close()


def test_repeats_are_ignored_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for sequences in ((1, 2, 2, 1), (1, 2, 3), (3, 4)):
        log = MetricsLog(path)
        written = [log.append(record(sequence)) for sequence in sequences]
        log.close()
    assert written == [False, True]
    assert [line["sequence"] for line in lines(path)] == [1, 2, 3, 4]


def test_a_torn_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"sequence": 1}\n{"kind": "actors"}\n{"sequence": 2, "ti')
    log = MetricsLog(path)
    assert log.last_sequence == 1
    assert log.append(record(2))
    log.close()
    assert [line.get("sequence") for line in lines(path)] == [1, None, 2]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"sequence": 1}\nnonsense\n{"sequence": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not JSON"):
        MetricsLog(tmp_path / "metrics.jsonl", trackers(tmp_path))


def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, time and value by tag, as who knows none of TensorBoard's plugins reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.wall_time, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_actor_reports_have_seconds_in_lines_and_shares_of_the_time_in_tensorboard(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers(tmp_path))
    # the last two: nothing new is known; restarted, it counts from nothing again
    for time, busy, waited in ((5.0, 3.0, 1.0), (10.0, 4.0, 4.0), (15.0, 4.0, 4.0), (20.0, 6.0, 2.0)):
        seconds = {"busy": busy, "wait:store": waited}
        log.append_actors(time, 4, [Report(name="learner", role="learner", seconds=seconds, gauges={"q": 2.0})])
    log.close()
    assert lines(tmp_path / "metrics.jsonl")[1] == {
        "time": 10.0, "kind": "actors", "step": 4, "learner/busy_s": 4.0, "learner/wait:store_s": 4.0, "learner/q": 2.0
    }  # fmt: skip
    found = scalars(tmp_path / "tensorboard")
    assert found["actors/learner/busy"] == [(4, 5.0, 0.75), (4, 10.0, 0.25), (4, 20.0, 0.75)]
    assert found["actors/learner/wait:store"] == [(4, 5.0, 0.25), (4, 10.0, 0.75), (4, 20.0, 0.25)]
    assert len(found["actors/learner/q"]) == 4
    assert len(found) == 3


def test_a_full_disk_is_named_and_what_was_written_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(record(1))
    log._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(DiskFull, match=r"no room for .*metrics\.jsonl \(No space left on device\)"):
        log.append(record(2))
    log.close()  # no second error hides the first
    log = MetricsLog(path)
    assert log.append(record(2))
    log.close()
    assert [line["sequence"] for line in lines(path)] == [1, 2]


def test_tensorboard_reads_the_same_figures(tmp_path: Path) -> None:
    for steps in ((1, 2), (3,)):  # two processes
        log = MetricsLog(tmp_path / "metrics.jsonl", trackers(tmp_path))
        for step in steps:
            log.append(record(step, update=step, **{"reward/mean": step / 4}))
        log.close()
    assert scalars(tmp_path / "tensorboard") == {"reward/mean": [(1, 101.0, 0.25), (2, 102.0, 0.5), (3, 103.0, 0.75)]}


def test_writing_needs_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.types import Record, Version
from asyncrl.report.trackers import RunFacts, Trackers
log = MetricsLog(Path(sys.argv[1]) / "m", Trackers(["tensorboard"], RunFacts(name="run", run_dir=sys.argv[1])))
log.append(Record(sequence=1, time=1.0, kind="step", version=Version(0, 1), metrics={"x": 1.0}))
log.close()
print(sorted({"torch", "tensorflow", "ray"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
