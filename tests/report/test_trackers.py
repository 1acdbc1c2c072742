"""Trackers get what metrics.jsonl gets, and nothing that they do disturbs a run."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from asyncrl.config import Deployment
from asyncrl.errors import ConfigError
from asyncrl.report import trackers as module
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.report.trackers import RunFacts, Trackers, check_tracker
from asyncrl.types import Record, Version

FACTS = RunFacts(name="run", run_dir="/nowhere")


class Noting:
    """What it was told, in which thread."""

    def __init__(self) -> None:
        self.told: list = []
        self.closed = threading.Event()

    def start(self, facts: RunFacts) -> None:
        self.told.append(facts)

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        self.told.append((dict(metrics), step, time))

    def close(self) -> None:
        self.told.append(threading.current_thread().name)
        self.closed.set()


def lines(count: int) -> Iterator[Record]:
    for number in range(1, count + 1):
        yield Record(sequence=number, time=float(number), kind="step", version=Version(0, number), metrics={"x": number / 2})


def write(path: Path, told: Trackers, count: int = 3) -> float:
    """Seconds that it took to write so many lines."""
    log, began = MetricsLog(path, told), time.monotonic()
    assert all(log.append(record) for record in lines(count))
    took_s = time.monotonic() - began
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, count + 1))
    return took_s


def test_a_tracker_gets_every_line_in_order_and_repeats_none(tmp_path: Path) -> None:
    noting = Noting()
    write(tmp_path / "m", Trackers([], FACTS, {"noting": lambda: noting}))
    assert noting.told == [FACTS, *[({"x": n / 2}, n, float(n)) for n in (1, 2, 3)], "tracker-noting"]


@pytest.mark.parametrize("method", ["start", "log", "close"])
def test_one_that_raises_is_told_once_and_disturbs_nobody(method: str, tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-0123456789abcdefghij")

    def broken(*_: object) -> None:
        raise ValueError("no use for sk-0123456789abcdefghij")

    raising, noting = Noting(), Noting()
    setattr(raising, method, broken)
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "m", Trackers([], FACTS, {"raising": lambda: raising, "noting": lambda: noting}))
    assert [record.message.count("tracker raising: ValueError: no use for [redacted]") for record in caplog.records] == [1]
    assert len(noting.told) == 5
    assert len(raising.told) == {"start": 1, "log": 2, "close": 4}[method]  # it is closed, and asked with the next line


@pytest.mark.parametrize("method", ["start", "log", "close"])
def test_one_that_hangs_delays_no_line_and_the_end_by_a_bound(method: str, tmp_path: Path, caplog, monkeypatch) -> None:
    """More lines than its queue takes: they are dropped, not waited for."""
    monkeypatch.setattr(module, "QUEUED", 5)
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    hanging, noting, go = Noting(), Noting(), threading.Event()
    setattr(hanging, method, lambda *_: go.wait(60))
    told = Trackers([], FACTS, {"hanging": lambda: hanging, "noting": lambda: noting})
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        took_s = write(tmp_path / "m", told, 3 if method == "close" else 50)
    assert took_s < 30
    assert 0.2 <= time.monotonic() - began < 50
    assert sum("hanging has not ended after 0.2 s" in record.message for record in caplog.records) == 1
    behind = sum("hanging does not keep up" in record.message for record in caplog.records)
    assert behind == (method != "close")
    assert noting.closed.wait(60)
    go.set()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", r"trackers='tensorbord' is none of tensorboard, wandb, mlflow; a class of your own"),
        ("my_module:Tracker", "no module 'my_module'"),
        ("json:Tracker", "json has no 'Tracker'"),
    ],
)
def test_an_unknown_tracker_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tracker(name)


def test_one_that_is_not_installed_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(module.TRACKERS, "wandb", ("x:Y", "no_such_package", "wandb"))
    with pytest.raises(ConfigError, match=r"needs the package no_such_package: pip install 'asyncrl\[wandb\]'"):
        check_tracker("wandb")
    check_tracker("tensorboard")


def test_a_users_own_is_found_by_its_name_or_given_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def start(self, facts): self.file = open(facts.run_dir + '/mine.txt', 'w')\n"
        "    def log(self, metrics, step, time): print(step, metrics['x'], file=self.file)\n"
        "    def close(self): self.file.close()\n"
    )
    name = f"{tmp_path / 'mine.py'}:Mine"
    check_tracker(name)
    write(tmp_path / "m", Trackers([name], RunFacts(name="run", run_dir=str(tmp_path))))
    assert (tmp_path / "mine.txt").read_text() == "1 0.5\n2 1.0\n3 1.5\n"
    [reference] = Deployment(trackers=(Noting,)).trackers
    assert reference.endswith(":Noting")


def test_facts_have_no_secrets() -> None:
    facts = RunFacts.of("run", "/r", False, Deployment(ray_address="ray://me:pass1234word@host:1"))
    assert facts.recipe["ray_address"] == "ray://[redacted]@host:1"
    assert facts.recipe["trackers"] == ("tensorboard",)


WANDB = """
import sys
import asyncrl.report.trackers
from asyncrl.report.trackers import RunFacts, Trackers
asyncrl.report.trackers.CLOSE_S = 200.0  # on a busy machine it takes a while to import
facts = RunFacts(name="run", run_dir=sys.argv[1], recipe={"total_steps": 4})
told = Trackers(["wandb"], facts)
for step in map(int, sys.argv[2:]):
    told.log({"reward/mean": step / 4}, step, float(step))
told.log({"eval/score": 0.5}, 1, 9.0)  # of an update that is past
told.close()
"""


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path: Path, script_env: Callable[..., dict[str, str]]) -> None:
    """The real library, offline: two processes, one id; figures by update, the late evaluation too; nothing of the machine."""
    pytest.importorskip("wandb", reason="extra [wandb]")
    secret = "s3cr3t-of-the-environment"
    environ = script_env(WANDB_MODE="offline", WANDB_SILENT="true", MY_SECRET=secret, HOME=str(tmp_path))
    for steps in (("1", "2"), ("3", "4")):
        done = [sys.executable, "-c", WANDB, str(tmp_path), *steps]
        subprocess.run(done, check=True, timeout=250, env=environ, capture_output=True, text=True)
    identity = (tmp_path / "trackers" / "wandb.id").read_text()
    files = sorted((tmp_path / "trackers" / "wandb").rglob("*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    found = [history(file) for file in files]
    assert found[0] == [{"reward/mean": 0.25, "update": 1}, {"reward/mean": 0.5, "update": 2}, {"eval/score": 0.5, "update": 1}]
    assert found[1][:2] == [{"reward/mean": 0.75, "update": 3}, {"reward/mean": 1.0, "update": 4}]
    written = b"".join(path.read_bytes() for path in (tmp_path / "trackers").rglob("*") if path.is_file())
    assert secret.encode() not in written
    assert b"total_steps" in written


def history(path: Path) -> list[dict[str, float]]:
    """The figures in one of W&B's files, without what it adds itself."""
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for data in records(path.read_bytes()):
        record = pb.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found


def records(content: bytes) -> Iterator[bytes]:
    """As LevelDB writes logs: in blocks of 32 KiB, pieces behind a checksum, a length and a kind (1 or 4: the last piece)."""
    at, block, whole = 7, 32768, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.fixture
def script_env() -> Callable[..., dict[str, str]]:
    """The environment of a script, with more."""
    return lambda **more: {**os.environ, **more}


class Client:
    """MLflow's, as far as it is used; what it was told stays on the class."""

    told: list = []

    def get_experiment_by_name(self, name: str) -> None:
        self.told.append(("experiment", name))

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        self.told.append(("run", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def update_run(self, run: str, status: str) -> None:
        self.told.append(("again", run, status))

    def log_param(self, run: str, name: str, value: str) -> None:
        self.told.append((name, value))

    def log_batch(self, run: str, metrics: Sequence[tuple]) -> None:
        self.told.append((run, list(metrics)))

    def set_terminated(self, run: str) -> None:
        self.told.append(("end", run))


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(tmp_path: Path, monkeypatch) -> None:
    """Its names have no @, and its values are finite."""
    monkeypatch.setattr(Client, "told", [])
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=lambda *figures: figures))
    for step in (1, 2):
        told = Trackers(["mlflow"], RunFacts(name="run", run_dir=str(tmp_path), recipe={"learner": {"lr": 0.5}}))
        told.log({"eval/pass@4": step / 4, "x": float("nan")}, step, 1.5)
        told.close()
    assert Client.told == [
        ("experiment", "asyncrl"), ("run", "7", "run"), ("recipe.learner.lr", "0.5"),
        ("r1", [("eval/pass_4", 0.25, 1500, 1)]), ("end", "r1"),
        ("again", "r1", "RUNNING"), ("r1", [("eval/pass_4", 0.5, 1500, 2)]), ("end", "r1"),
    ]  # fmt: skip
