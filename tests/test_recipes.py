"""The shipped recipes, run for real: what the README promises, in a shorter form."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from asyncrl import launch
from asyncrl.callables import load_callable
from asyncrl.cli import main
from asyncrl.jobs.specs import load_specs
from asyncrl.paths import resolve_paths
from asyncrl.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("problem", "answer", "careless"),
    [
        ((12, "+", 45), "750", "750"),
        ((17, "+", 5), "220", "210"),  # the carry into the tens is forgotten
        ((99, "+", 99), "891", "880"),
        ((52, "-", 17), "530", "540"),  # tens 5 - 1 = 4 without the borrow, ones (2 - 7) mod 10 = 5
        ((40, "-", 40), "000", "000"),
    ],
)
def test_arithmetic_answers(arithmetic, problem, answer, careless):
    made = arithmetic.Problem(*problem)
    assert (made.answer, made.careless_answer) == (answer, careless)


def test_arithmetic_problems_are_distinct_and_seeded(arithmetic):
    problems = arithmetic._problems(0)
    assert len(set(problems)) == len(problems) == arithmetic.TRAIN + arithmetic.HELD_OUT
    assert problems == arithmetic._problems(0) != arithmetic._problems(1)


def test_arithmetic_reward_is_exact(arithmetic):
    assert [arithmetic.compute_score("addition", text, "750") for text in ("750", "75", "7500", "")] == [1.0, 0.0, 0.0, 0.0]


def test_own_loss_by_hand():
    my_loss = load_callable(f"{ROOT / 'recipes' / 'own_loss.py'}:my_loss")
    logp_t = torch.tensor([1.0, 1.5, 1.5, 1.2, 0.5]).log().requires_grad_()
    advantages_t = torch.tensor([2.0, 1.0, -1.0, 3.0, 0.0])
    loss_t, figures = my_loss(logp_t, torch.zeros(5), advantages_t, torch.zeros(5, dtype=torch.long))
    # |A|/0.4·(r − 1)² − r·A: the penalty is 0.25/0.4 = 0.625 at r = 1.5, and 3·0.04/0.4 = 0.3 at r = 1.2
    torch.testing.assert_close(loss_t.detach(), torch.tensor([-2.0, 0.625 - 1.5, 0.625 + 1.5, 0.3 - 3.6, 0.0]))
    loss_t.sum().backward()
    # r·(|A|/0.2·(r − 1) − A): as policy gradient at r = 1; draws back from 1.5; nothing at r = 1 + ε, where A > 0
    torch.testing.assert_close(logp_t.grad, torch.tensor([-2.0, 2.25, 5.25, 0.0, 0.0]), rtol=0, atol=1e-5)
    assert figures["outside"].tolist()[:3] == [False, True, True]
    assert figures["outside"][4]


def test_own_loss_dry_run(tmp_path, capsys):
    assert main(["run", str(ROOT / "recipes" / "own_loss.py"), "--runs-dir", str(tmp_path), "--dry-run"]) == 0
    assert "own_loss" in capsys.readouterr().out
    recipe, _ = load_specs(ROOT / "recipes" / "own_loss.py", None, [])
    resolved = resolve_paths(recipe, RunDir(tmp_path / "own_loss"), ROOT / "recipes")
    assert resolved.algorithm.policy_loss == f"{ROOT / 'recipes' / 'own_loss.py'}:my_loss"
    assert resolved.prepare == f"{ROOT / 'recipes' / 'arithmetic.py'}:prepare"


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_arithmetic_learns(local_ray, tmp_path):
    """One seed, 120 of the 200 updates: held-out exact match from at most 0.5 to at least 0.9, then a second run
    that finds the warm policy in the run directory."""
    recipe, deployment = load_specs(ROOT / "recipes" / "arithmetic.py", None, ["total_steps=120"])
    recipe = resolve_paths(recipe, RunDir(tmp_path / "arithmetic"), ROOT / "recipes")
    result = launch(recipe, deployment, runs_dir=tmp_path)
    assert result.steps == 120
    assert result.first_score is not None
    assert result.first_score <= 0.5
    assert result.last_score is not None
    assert result.last_score >= 0.9
    assert result.max_trained_lag <= 4
    assert result.restarts == {}
    assert result.samples == result.trained * 8
    run = Path(result.run_dir)
    assert pq.read_schema(run / "data" / "train.parquet").names == [
        "data_source",
        "prompt",
        "ability",
        "reward_model",
        "extra_info",
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 121))
    evaluated = [line["step"] for line in lines if line["kind"] == "eval"]
    assert (evaluated[0], evaluated[-1], len(evaluated)) == (0, 120, 6)
    # a generator that never held the very version asked for is evaluated at the next one it takes
    assert all(0 <= step - due <= 4 for step, due in zip(evaluated, [0, 25, 50, 75, 100, 120], strict=True))

    warm = run / "data" / "warm" / "made.json"
    made_at = warm.stat().st_mtime_ns
    again = resolve_paths(
        load_specs(ROOT / "recipes" / "arithmetic.py", None, ["total_steps=2"])[0], RunDir(run), ROOT / "recipes"
    )
    second = launch(again, deployment, runs_dir=tmp_path)
    assert second.steps == 2
    assert warm.stat().st_mtime_ns == made_at, "the warm-up was done again"
    assert second.first_score == result.first_score
