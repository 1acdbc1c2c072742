"""`asyncrl simulate` on the command line."""

from pathlib import Path

import pytest

from asyncrl.cli import main

RECIPE = """
from asyncrl.config import *

recipe = Recipe(
    name="sums",
    model=ModelSpec(path="model"),
    data=DataSpec(files=("train.parquet",)),
    reward=RewardSpec(function="rewards.py:compute_score"),
    sampling=SamplingSpec(n=4, max_response_length=64),
    learner=LearnerSpec(batch_groups=4),
    total_steps=10,
)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return str(tmp_path / "recipe.py")


def simulate(recipe: str, *arguments: str) -> int:
    return main(["simulate", recipe, "--updates", "20", "costs.length_median=10", *arguments])


def test_every_setting_has_its_line_and_the_best_is_named(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    tried = ["--try", "deploy.generators.count=1,2:costs.update_s=0.1,9", "--try", "staleness.max_lag=0,4"]
    assert simulate(recipe, *tried) == 0
    out = capsys.readouterr().out.splitlines()
    assert "length_median=10" in out[0]
    assert out[4].split("  ")[0] == "samples/s"
    settings = [line.split("  ")[-1] for line in out[5:-1]]
    assert settings == [
        f"deploy.generators.count={count} costs.update_s={update_s} staleness.max_lag={max_lag}"
        for count, update_s in ((1, "0.1"), (2, "9"))
        for max_lag in (0, 4)
    ]
    rates = dict(zip(settings, (float(line.split()[0]) for line in out[5:-1]), strict=True))
    fastest = max(rates, key=rates.__getitem__)
    assert fastest == settings[1]
    assert out[-1].startswith(f"best: {fastest} (")


def test_a_setting_that_cannot_run_is_told_and_left_out(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(recipe, "--try", "staleness.reserve_ahead=2,9", "staleness.max_lag=3") == 0
    told = capsys.readouterr()
    assert "best: staleness.reserve_ahead=2" in told.out
    assert told.err.startswith("staleness.reserve_ahead=9: staleness.reserve_ahead=9 > 4:")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--try", "staleness.max_lag"], "--try 'staleness.max_lag': expected FIELD=A,B,…"),
        (["--try", "a=1,2:b=1"], "with as many values for each field"),
        (["--try", "staleness.max_lg=1,2"], "none of what was tried can be run"),
        (["staleness.max_lg=1"], "has no field 'max_lg'"),
        (["costs.step_ms=1"], "did you mean 'step_s'?"),
        (["--from", "nowhere"], "nowhere is no run directory of asyncrl"),
        (["--updates", "3"], "--updates 3 < 10"),
    ],
)
def test_mistakes(recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert simulate(recipe, *arguments) == 2
    assert said in capsys.readouterr().err
