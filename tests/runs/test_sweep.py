"""The sweep that docs/recipes.md prints, over two trials of a tiny recipe: each launches its run in the Ray that Tune uses."""

import re
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import EvaluationSpec

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_the_printed_sweep_runs(local_ray, tiny_recipe, tmp_path, monkeypatch, metrics_of):
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    recipe = tiny_recipe(total_steps=2)
    data = recipe.data.files
    recipe = tiny_recipe(total_steps=2, evaluation=EvaluationSpec(files=data, freq=1, limit=4))
    page = (ROOT / "docs" / "recipes.md").read_text()
    [program] = [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "tune.Tuner(" in block]
    for printed, here in (
        ('load_recipe("gsm8k.py")', "RECIPE"),
        ('"/shared/runs"', "RUNS"),
        ("[1e-6, 2e-6]", "[1e-3, 1e-2]"),
    ):
        assert printed in program
        program = program.replace(printed, here)
    made: dict[str, Any] = {"RECIPE": recipe, "RUNS": str(tmp_path / "runs"), "__name__": "sweep"}
    exec(compile(program, "recipes.md", "exec"), made)
    results = made["results"]
    assert results.num_errors == 0
    assert sorted(result.config["learner.lr"] for result in results) == [1e-3, 1e-2]
    scores = [result.metrics["score"] for result in results]
    assert made["best"].metrics["score"] == max(scores)
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    assert sorted(scores) == sorted(metrics_of(run, "eval")[-1]["eval/score"] for run in runs)
    assert {metrics_of(run, "step")[-1]["actor/lr"] for run in runs} == {1e-3, 1e-2}
