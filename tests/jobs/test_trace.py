"""`asyncrl trace`: a small run's log becomes a file for Perfetto."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import asyncrl.replay.log.events as ev
from asyncrl.cli import main
from asyncrl.jobs import trace as job


@pytest.fixture
def run(small_run: Callable[[], Any]) -> str:
    made = small_run()
    for update in (1, 2, 3):
        started = {"reserved": made.at, "started": made.at, "finished": made.at + 0.1, "swap 1": made.at + 0.05}
        made.group(2 * update, times=started)
        made.group(2 * update + 1, (1.0, None))
        made.train(update, 2 * update, 2 * update + 1, **{"timing_s/step": 0.25, "loss": 1.0})
    made.write(ev.EvalRequested(ev.Version(1, 3)), ev.CheckpointRetained(2), ev.HolderDied("generator-0", 1, (9,)))
    return str(made.close())


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_run_is_written(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["trace", run, "--out", str(tmp_path / name)]) == 0
    data = (tmp_path / name).read_bytes()
    found = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    events = found["traceEvents"]
    assert found["otherData"] == {"run": run, "zero": 1000.0}
    assert sum(e["ph"] == "X" and e["cat"] == "generate" for e in events) == 12
    assert sum(e["ph"] == "f" for e in events) == 9  # three are invalid
    assert [e["dur"] for e in events if e["name"].startswith("update ") and e["ph"] == "X"] == [250_000] * 3
    assert {e["name"] for e in events if e["ph"] == "i"} == {
        "learner restarts as incarnation 1", "swap to update 1", "died", "older checkpoints go",
        "evaluation of update 3 asked for",
    }  # fmt: skip
    assert f"{len(events):,} events" in capsys.readouterr().err


def test_updates_that_were_asked_for(run: str, tmp_path: Path) -> None:
    main(["trace", run, "--out", str(tmp_path / "two.json"), "--from", "2", "--to", "2"])
    events = json.loads((tmp_path / "two.json").read_text())["traceEvents"]
    assert {e["args"]["group"] for e in events if e.get("cat") == "generate"} == {4, 5}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--from 3 --to 1", "nothing lies between"),
        ("--from -3", "--from -3 < 0"),
        ("--from 4", "there are updates 1 to 3"),
        ("--to 0", "there are updates 1 to 3"),
    ],
)
def test_what_is_not_there_is_an_error(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main(["trace", run, "--out", str(tmp_path / "t.json"), *flags.split()]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.glob("*.json")) == []


def test_a_file_that_could_not_be_finished_is_not_there(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> int:
        raise OSError("no more")

    monkeypatch.setattr(job, "_write", fails)
    with pytest.raises(OSError, match="no more"):
        main(["trace", run, "--out", str(tmp_path / "t.json")])
    assert list(tmp_path.glob("*t.json*")) == list(tmp_path.glob(".*t.json*")) == []
