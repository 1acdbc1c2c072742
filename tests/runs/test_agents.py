"""An agent of the OpenAI SDK in a whole run: the shipped recipe, in a shorter form."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import asyncrl.replay
from asyncrl import launch
from asyncrl.config.load import load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.rundir import RunDir

pytest.importorskip("openai", reason="needs openai (pip install 'asyncrl[test]')")
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "calculator_agent.py"


def test_the_calculator(script: Callable[[Path], ModuleType]) -> None:
    calculate = script(RECIPE).calculate
    shown = [calculate(asked) for asked in ("23*47", "1081+58", "10-11", "99*9999", "1+1+1", "")]
    assert shown == ["1081", "1139", "E", "E", "E", "E"]


@pytest.mark.ray
def test_the_agent_is_trained_as_it_is(local_ray, script, tmp_path: Path, metrics_of) -> None:
    """6 of the 40 updates, from a policy that was warmed up for a fifth of the time."""
    module = script(RECIPE)
    module.WARM_STEPS = 100
    run = RunDir(tmp_path / "calculator_agent")
    recipe, deployment = load_specs(RECIPE, None, ["total_steps=6", "evaluation.freq=6", "evaluation.limit=32"])
    module.prepare(recipe, run.path)
    result = launch(resolve_paths(recipe, run, RECIPE.parent), deployment, runs_dir=tmp_path)
    assert (result.steps, result.samples, result.invalid, result.timeout) == (6, 6 * 128, 0, 0)
    steps = metrics_of(run.path, "step")
    assert max(line.get("gap/logprob_max_abs", 0.0) for line in steps) <= 3e-5  # over all turns, through HTTP; some are -13
    columns = ["response_ids", "loss_mask", "turns", "segments", "episode", "trained_update"]
    rows = [row for row in asyncrl.replay.open(run.path).rollouts(columns).to_pylist() if row["trained_update"]]
    assert len(rows) == 6 * 128
    asked = 0
    for row in rows:
        messages = json.loads(json.loads(row["episode"])["messages"])
        said = [message for message in messages if message["role"] == "assistant"]
        assert (row["segments"], len(row["turns"])) == (None, len(said))  # what the SDK echoes goes on with what was sampled
        asked += sum(len(message.get("tool_calls", ())) for message in said)
    assert asked >= 64
