"""The doctor's verdicts: what it finds here, and what it says of things that are missing or broken."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl.jobs import doctor
from asyncrl.report.findings import Finding
from asyncrl.scratch import Trace


def run_doctor(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.doctor_job(parser)
    args = parser.parse_args(argv)
    status: int = args.job(args)
    return status


def test_a_machine_that_can_run_asyncrl_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor("--json") == 0
    told = json.loads(capsys.readouterr().out)
    status = {finding["name"]: finding["status"] for finding in told["findings"]}
    assert told["ok"]
    for name in ("python", "torch", "collectives", "ray", "transformers", "zeromq", "arrow", "torch engine"):
        assert status[name] == "ok"
    for finding in told["findings"]:
        assert finding["status"] == "ok" or finding["fix"]


def test_required_findings_decide_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    extra = Finding(name="duckdb", status="missing", detail="queries", fix="pip install duckdb", required=False)
    lacking = Finding(name="ray", status="missing", detail="no module", fix="pip install 'ray[default]'")
    monkeypatch.setattr(doctor, "examine", lambda: [extra])
    assert run_doctor() == 0
    monkeypatch.setattr(doctor, "examine", lambda: [extra, lacking])
    assert run_doctor() == 1
    assert capsys.readouterr().out.splitlines()[4:8] == [
        "missing  duckdb         queries (optional)",
        "                        fix: pip install duckdb",
        "missing  ray            no module",
        "                        fix: pip install 'ray[default]'",
    ]


def test_each_finding_is_told_as_soon_as_it_is_known_and_slow_checks_come_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []

    def one_after_the_other() -> Iterator[Finding]:
        for name in ("first", "second"):
            yield Finding(name=name, detail="here")
            told.append(capsys.readouterr().out)  # before the next check runs

    monkeypatch.setattr(doctor, "examine", one_after_the_other)
    assert run_doctor() == 0
    assert told == ["ok       first          here\n", "ok       second         here\n"]
    monkeypatch.undo()
    code = """
import sys
from asyncrl.jobs.doctor import examine
for finding in examine():
    if finding.name == "torch":
        break
    print(finding.name, *sorted({"torch", "ray", "transformers"} & set(sys.modules)), sep=",")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    rows = ["python", "disk", "shared memory", "large pages", "leftovers", "containment", *doctor.OPTIONAL, "zeromq", "arrow"]
    assert done.stdout.splitlines() == rows


def test_containment_says_whether_there_are_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "refused", lambda more=0: "unshare: No space left on device" if more else "")
    assert doctor.containment().detail.endswith("; network can't be cut off here, and is not")
    monkeypatch.setattr(doctor, "refused", lambda more=0: "unshare: Operation not permitted")
    found = doctor.containment()
    assert (found.status, found.required) == ("missing", False)
    assert "no PID namespaces (unshare: Operation not permitted)" in found.detail


def test_leftovers_name_the_command_that_removes_them() -> None:
    assert doctor.leftovers([]).detail == "none; 0 in use by living runs"
    left = [Trace(path=Path("/x"), what="session of Ray", size_bytes=1 << 20, in_use=in_use) for in_use in (False, True, False)]
    assert doctor.leftovers(left).detail == (
        "dead runs left 2.0 MiB: session of Ray (2); `asyncrl clean` lists and removes it; 1 in use by living runs"
    )


def test_a_disk_with_little_room_is_told(tmp_path: Path) -> None:
    assert doctor.disk([tmp_path / "runs"], least_bytes=1).status == "ok"
    little = doctor.disk([tmp_path / "runs"], least_bytes=1 << 60)
    assert (little.status, little.required) == ("broken", False)
    assert f"free for {tmp_path}/runs: below 1073741824.0 GiB" in little.detail


@pytest.fixture
def required(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asyncrl requires, whatever was installed."""
    requires = ["torch<2.14,>=2.13", 'pytest>=8; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)


@pytest.mark.usefixtures("required")
def test_a_check_that_raises_is_a_finding_with_the_required_fix() -> None:
    def missing() -> Finding:
        raise ModuleNotFoundError("No module named 'torch'")

    def broken() -> Finding:
        raise OSError("libcudart.so: cannot open\nmore")

    assert doctor.guarded("collectives", missing, "torch") == Finding(
        name="collectives",
        status="missing",
        detail="ModuleNotFoundError: No module named 'torch'",
        fix="pip install --force-reinstall 'torch<2.14,>=2.13'",
    )
    assert doctor.guarded("torch", broken, "torch").status == "broken"
    assert doctor.guarded("torch", broken, "torch").detail == "OSError: libcudart.so: cannot open"


@pytest.mark.usefixtures("required")
def test_versions_are_compared_with_what_asyncrl_asks_for() -> None:
    assert doctor.requirement("torch") == "torch<2.14,>=2.13"
    assert doctor.requirement("pytest") == ""  # of an extra
    assert doctor.versioned("torch", "2.13.0+cpu").status == "ok"
    old = doctor.versioned("torch", "2.4.0")
    assert (old.status, old.fix) == ("broken", "pip install 'torch<2.14,>=2.13'")


def test_shared_memory(tmp_path: Path) -> None:
    assert doctor.shared_memory(tmp_path, least_bytes=1).status == "ok"
    assert list(tmp_path.iterdir()) == []  # nothing left behind
    small = doctor.shared_memory(tmp_path, least_bytes=1 << 60)
    assert (small.status, small.required) == ("broken", False)
    assert "--shm-size" in small.fix
    assert doctor.shared_memory(tmp_path / "none").status == "missing"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("always within_size advise [never] deny force", "missing"),
        ("always within_size [advise] never deny force", "missing"),
        ("always [within_size] advise never deny force", "ok"),
        (None, "ok"),  # a kernel without them
    ],
)
def test_large_pages(tmp_path: Path, text: str | None, status: str) -> None:
    file = tmp_path / "shmem_enabled"
    if text is not None:
        file.write_text(text)
    found = doctor.large_pages(file)
    assert (found.status, str(file) in found.detail) == (status, True)
    assert found.required == (status == "ok")
    assert found.fix == (f"echo within_size | sudo tee {file}" if status == "missing" else "")


def test_an_extra_that_is_not_installed_names_its_command() -> None:
    assert doctor.optional("no-such-extra", "testing", "pip install no-such-extra") == Finding(
        status="missing", detail="testing", fix="pip install no-such-extra", required=False
    )
    assert doctor.optional("pytest", "tests", "x").status == "ok"
