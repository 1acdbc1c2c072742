"""The doctor's verdicts: what it finds here, and what it says of things that are missing or broken."""

import argparse
import json
from pathlib import Path

import pytest

from asyncrl.jobs import doctor
from asyncrl.report.findings import Finding


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
    extra = Finding(name="wandb", status="missing", detail="tracking", fix="pip install wandb", required=False)
    lacking = Finding(name="ray", status="missing", detail="no module", fix="pip install 'ray[default]'")
    monkeypatch.setattr(doctor, "examine", lambda: [extra])
    assert run_doctor() == 0
    monkeypatch.setattr(doctor, "examine", lambda: [extra, lacking])
    assert run_doctor() == 1
    assert capsys.readouterr().out.splitlines()[4:8] == [
        "missing  wandb          tracking (optional)",
        "                        fix: pip install wandb",
        "missing  ray            no module",
        "                        fix: pip install 'ray[default]'",
    ]


def test_a_check_that_raises_is_a_finding_with_the_pinned_fix() -> None:
    def missing() -> Finding:
        raise ModuleNotFoundError("No module named 'torch'")

    def broken() -> Finding:
        raise OSError("libcudart.so: cannot open\nmore")

    assert doctor.guarded("collectives", missing, "torch") == Finding(
        name="collectives",
        status="missing",
        detail="ModuleNotFoundError: No module named 'torch'",
        fix="pip install --force-reinstall 'torch==2.13.0'",
    )
    assert doctor.guarded("torch", broken, "torch").status == "broken"
    assert doctor.guarded("torch", broken, "torch").detail == "OSError: libcudart.so: cannot open"


def test_versions_are_compared_with_what_asyncrl_asks_for() -> None:
    assert doctor.requirement("torch") == "torch==2.13.0"
    assert doctor.requirement("pytest") == ""  # of an extra
    assert doctor.versioned("torch", "2.13.0+cpu").status == "ok"
    old = doctor.versioned("torch", "2.4.0")
    assert (old.status, old.fix) == ("broken", "pip install 'torch==2.13.0'")


def test_shared_memory(tmp_path: Path) -> None:
    assert doctor.shared_memory(tmp_path, least_bytes=1).status == "ok"
    assert list(tmp_path.iterdir()) == []  # nothing left behind
    small = doctor.shared_memory(tmp_path, least_bytes=1 << 60)
    assert (small.status, small.required) == ("broken", False)
    assert "--shm-size" in small.fix
    assert doctor.shared_memory(tmp_path / "none").status == "missing"


def test_an_extra_that_is_not_installed_names_its_command() -> None:
    assert doctor.optional("no-such-extra", "testing", "pip install no-such-extra") == Finding(
        status="missing", detail="testing", fix="pip install no-such-extra", required=False
    )
    assert doctor.optional("pytest", "tests", "x").status == "ok"
