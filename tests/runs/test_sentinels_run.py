"""Runs that go wrong on purpose: what is ready fires, and what stops ends the run in order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncrl import Recipe, Trainer, launch
from asyncrl.config import (
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    LearnerSpec,
    ModelSpec,
    RewardSpec,
    SamplingSpec,
    SentinelSpec,
    StalenessSpec,
    entropy_collapse,
    length_explosion,
    one_answer,
    reward_hacking,
)
from asyncrl.errors import SentinelFired
from asyncrl.manifests import read_manifest
from asyncrl.rundir import RunDir

pytestmark = pytest.mark.ray
pytest.importorskip("duckdb")
LONGEST = 56

# Prompts to train on pay for sevens, of which a long answer has more; held-out ones want a short answer.
HACKABLE = f"""
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str) <= 20) if data_source == "heldout" else solution_str.count("7") / {LONGEST}
"""


@pytest.fixture
def hackable(tmp_path: Path, tiny_model: Path, tiny_recipe: Callable[..., Recipe]) -> Recipe:
    """A recipe with that reward, for a policy that says anything at first, of some 16 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.get_input_embeddings().weight.data.mul_(0.1)  # tied: logits near 0
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    (tmp_path / "hackable.py").write_text(HACKABLE)
    for source, count in (("train", 64), ("heldout", 32)):
        rows = [{"prompt": f"{i:02d}+{7 * i % 100:02d}=", "data_source": source, "answer": ""} for i in range(count)]
        (tmp_path / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_recipe(
        model=ModelSpec(path=str(tmp_path / "model")),
        data=DataSpec(files=(str(tmp_path / "train.jsonl"),), answer_key="answer", max_prompt_length=8),
        reward=RewardSpec(function=f"{tmp_path}/hackable.py:compute_score"),
        sampling=SamplingSpec(n=4, max_response_length=LONGEST),
        staleness=StalenessSpec(max_lag=2),
        learner=LearnerSpec(batch_groups=8, lr=1e-2),
        evaluation=EvaluationSpec(files=(str(tmp_path / "heldout.jsonl"),), freq=10, temperature=1.0),
        checkpoint=CheckpointSpec(save_freq=100, keep_last_n=1),
        total_steps=40,
    )


def told(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "sentinels.jsonl").read_text().splitlines()]


def by_hand(run_dir: str | Path) -> list[int]:
    steps = RunDir(run_dir).steps()
    return [RunDir.update_of(folder) for folder in steps if read_manifest(folder)[1]["by_hand"]]


def test_a_reward_that_pays_for_the_wrong_thing_is_found_in_every_way(
    local_ray: None, hackable: Recipe, tmp_path: Path
) -> None:
    from msgspec.structs import replace

    ready = {
        "length": length_explosion(times=1.5, then="checkpoint"),
        "entropy": entropy_collapse(),
        "hack": reward_hacking(),
        "same": one_answer(),
    }
    result = launch(replace(hackable, sentinels=ready), runs_dir=tmp_path / "runs", progress=False)
    assert result.sentinels.keys() == ready.keys()
    fired = {one["sentinel"]: one for one in reversed(told(result.run_dir)) if one["event"] == "fired"}  # the first of each
    (length,) = fired["length"]["rows"]
    assert length["now"] >= 1.5 * length["before"]
    (entropy,) = fired["entropy"]["rows"]
    assert entropy["now"] < 0.1 * entropy["at_first"]
    assert all(row["score"] < 0.9 * row["best_score"] and row["reward"] > row["reward_then"] for row in fired["hack"]["rows"])
    assert fired["same"]["rows"][0]["response"].count("7") > 10
    (saved,) = by_hand(result.run_dir)
    assert fired["length"]["step"] < saved < 40


def test_a_sentinel_that_stops_leaves_a_checkpoint_and_stops_no_second_time(
    local_ray: None, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    many = SentinelSpec(when='select "group", rollout, response from rollouts where trained_update = 2', then="stop")
    recipe = tiny_recipe(sentinels={"many": many}, total_steps=12)
    with pytest.raises(SentinelFired, match=r"^sentinel many fired at update \d+: .*\n  group=") as stopped:
        launch(recipe, runs_dir=tmp_path, progress=False)
    run_dir, (fired,) = tmp_path / "tiny", told(tmp_path / "tiny")
    newest = RunDir.update_of(RunDir(run_dir).steps()[-1])
    assert (fired["count"], len(fired["rows"])) == (16, 16)
    assert fired["step"] == 2 <= newest
    assert f"update {newest} is saved in {run_dir}/checkpoints/step_{newest:06d}" in str(stopped.value)
    assert "resume_from=" in stopped.value.__notes__[0]
    with Trainer(recipe, runs_dir=tmp_path, resume_from=run_dir, progress=False) as trainer:
        result = trainer.fit()
    assert (result.steps, result.sentinels) == (12, {})
    assert [(one["step"], one["event"]) for one in told(run_dir)][:1] == [(2, "fired")]
    assert "fired" not in [one["event"] for one in told(run_dir)][1:]
