"""The stages put together by hand, as docs/composing.md prints it: one process, threads, no Ray."""

import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("estimator", "n"), [("grpo", 4), ("remax", 1)], ids=["as printed", "remax, n = 1 as in the paper"])
def test_the_printed_program_runs(
    arithmetic: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, n: int
) -> None:
    """Where a run of recipes/arithmetic.py has left a policy, here a random one, and data."""
    left = tmp_path / "runs" / "arithmetic" / "data"
    shutil.copytree(tiny_model, left / "warm")
    arithmetic._write_parquet(left / "train.parquet", arithmetic._rows(arithmetic._problems(0)[:64], "train"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    page = (ROOT / "docs" / "composing.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    printed, made = 'n, estimator = 4, "grpo"\n', dict[str, Any]()
    assert printed in program
    exec(compile(program.replace(printed, f"n, estimator = {n}, {estimator!r}\n"), "composing.md", "exec"), made)

    report, steps, run = made["report"], made["STEPS"], made["run"]
    assert not [worker.name for worker in made["workers"] if worker.is_alive()]
    assert report.counts.trained == steps * 4
    assert report.counts.pending == 0
    assert report.counts.reserved == report.counts.trained + report.counts.unused
    assert max(record.metrics["staleness/lag_max"] for record in report.records) <= 2
    assert [record.metrics["samples"] for record in report.records] == [4.0 * n] * steps
    assert all(("reward/baseline" in record.metrics) == (estimator == "remax") for record in report.records)
    assert [step.name for step in run.steps()] == ["step_000003", "step_000006"]
