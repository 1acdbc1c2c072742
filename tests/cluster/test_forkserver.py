"""The forkserver, with Ray left out: what stands in for Python is run by hand."""

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncrl.cluster.forkserver import forkserver

WORKER = """
import json, os, sys
seen = {
    "arguments": sys.argv, "name": __name__, "modules": "slow" in sys.modules, "WORD": os.environ.get("WORD"),
    "folder": os.getcwd(), "pid": os.getpid(), "parent": os.getppid(), "leads": os.getpgrp() == os.getpid(),
    "path": sys.path[0], "OMP": os.environ.get("OMP_NUM_THREADS"),
}
print(json.dumps(seen), flush=True)
print("told", file=sys.stderr)
sys.stdin.readline()
"""
# It says when it is imported, and takes its time: who comes early waits for it.
SLOW = """
import pathlib, time
pathlib.Path(__file__).with_name("imported").touch()
time.sleep(0.3)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


@pytest.fixture
def executable(folder: Path) -> Iterator[str]:
    with forkserver(["slow"]) as executable:
        yield executable


def begin(executable: str, folder: Path, **options: Any) -> "subprocess.Popen[str]":
    command = f"exec {executable} {folder}/worker.py --of 2"  # as Ray has it run
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(["bash", "-c", command], text=True, cwd=folder, **pipes, **options)


def ended(pid: int) -> None:
    """Waits until a process that is not ours has ended."""
    try:
        file = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([file], [], [], 10)[0]
    os.close(file)


def until(folder: Path) -> None:
    """Waits until the server has begun to import."""
    deadline = time.monotonic() + 20
    while not (folder / "imported").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_is_a_fork_that_has_everything_of_its_stand_in(executable: str, folder: Path) -> None:
    until(folder)
    workers = [begin(executable, folder, env=os.environ | {"WORD": word}) for word in ("one", "two")]
    seen = [json.loads(worker.stdout.readline()) for worker in workers]
    for worker, own in zip(workers, seen, strict=True):
        assert worker.poll() is None
        worker.stdin.write("\n")
        _, told = worker.communicate(timeout=10)
        assert told == "told\n"
        assert worker.returncode == 0
        ended(own["pid"])
    assert len({own.pop("pid") for own in seen} | {worker.pid for worker in workers}) == 4
    assert len({own.pop("parent") for own in seen}) == 1  # the server
    expected = {"arguments": [f"{folder}/worker.py", "--of", "2"], "name": "__main__", "modules": True, "leads": True}
    expected |= {"folder": str(folder), "path": str(folder), "OMP": None}
    assert seen == [{**expected, "WORD": "one"}, {**expected, "WORD": "two"}]


def test_a_worker_that_is_killed_ends_its_stand_in_and_no_other(executable: str, folder: Path) -> None:
    until(folder)
    workers = [begin(executable, folder) for _ in range(2)]
    first, second = (json.loads(worker.stdout.readline())["pid"] for worker in workers)
    os.killpg(first, 9)
    workers[0].communicate(timeout=10)
    assert workers[1].poll() is None
    workers[1].communicate("\n", timeout=10)
    ended(second)


def test_each_of_many_at_a_time_is_one_worker(executable: str, folder: Path) -> None:
    """Also those that end at once, before their stand-ins have heard of them."""
    until(folder)
    (folder / "worker.py").write_text("import os\nprint(os.getpid())\n")
    for _ in range(8):
        workers = [begin(executable, folder) for _ in range(8)]
        for worker in workers:
            told, _ = worker.communicate(timeout=20)
            assert len(told.split()) == 1
            assert int(told) != worker.pid


def test_a_stand_in_that_dies_costs_the_server_nothing(executable: str, folder: Path) -> None:
    until(folder)
    for said in (b"", b"[["):
        with socket.socket(socket.AF_UNIX) as stand_in:
            stand_in.connect(executable.rpartition(" ")[2])
            stand_in.sendall(said)
    worker = begin(executable, folder)
    assert json.loads(worker.stdout.readline())["pid"] != worker.pid
    worker.communicate("\n", timeout=10)


def test_without_a_server_it_is_python_itself(folder: Path) -> None:
    with forkserver(["slow"]) as executable:
        until(folder)
    worker = begin(executable, folder)
    seen = json.loads(worker.stdout.readline())
    assert seen["pid"] == worker.pid
    assert not seen["modules"]
    assert seen["arguments"] == [f"{folder}/worker.py", "--of", "2"]
    worker.communicate("\n", timeout=10)


def test_modules_that_cannot_be_imported_cost_time_only(folder: Path) -> None:
    with forkserver(["no_such_module"]) as executable:
        worker = begin(executable, folder)
        assert json.loads(worker.stdout.readline())["pid"] == worker.pid
        worker.communicate("\n", timeout=10)
