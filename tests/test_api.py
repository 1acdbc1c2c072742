"""A run from Python with everything switched on, on the tiny model under real Ray."""

import json
import re
from collections import defaultdict
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl import Callbacks, Recipe, RunResult, Trainer, launch
from asyncrl.config import (
    AlgorithmSpec,
    BusSpec,
    Deployment,
    EvalSettingSpec,
    EvaluationSpec,
    GeneratorsSpec,
    LearnerSpec,
    RewardSpec,
    RewardTerm,
    SamplingSpec,
    ShapingSpec,
)
from asyncrl.errors import ConfigError
from asyncrl.replay import open as open_replay
from asyncrl.replay.log import events as ev
from asyncrl.report.callbacks import SavedCheckpoint
from asyncrl.types import GroupCounts, Record

pytestmark = pytest.mark.ray

REWARDS = """
def brief(prompts, completions, answer, **columns):
    # TRL's convention; it does not apply to half of the rows
    assert prompts[0] and answer[0] == columns["ground_truth"][0]
    return [None if int(prompts[0][:2]) % 2 else 1.0 - len(completions[0]) / 6]
"""


@pytest.fixture(scope="module")
def told() -> list:
    """What the callbacks of `everything` got, in order."""
    return []


@pytest.fixture(scope="module")
def everything(local_ray, told, tiny_recipe_in, tmp_path_factory) -> RunResult:
    """Two generators over TCP, minibatches, epochs, KL to the reference, entropy bonus, evaluation of several samples, weighted
    rewards with shaping; functions that are given themselves, and callbacks."""
    letters = 6

    def sevens(data_source, solution_str, ground_truth, extra_info=None):
        return solution_str.count(ground_truth) / letters  # a closure: no other process finds it by name

    def pushed(logp_t, old_t, advantages_t, sequence_t):
        return -(logp_t - old_t).exp() * advantages_t, {}

    folder = tmp_path_factory.mktemp("everything")
    rewards = folder / "rewards.py"
    rewards.write_text(REWARDS)
    data = tiny_recipe_in(folder).data.files[0]
    recipe = tiny_recipe_in(
        folder,
        total_steps=12,
        learner=LearnerSpec(batch_groups=4, mini_batch_groups=2, ppo_epochs=2, lr=1e-3, lr_schedule="cosine", warmup_steps=2),
        algorithm=AlgorithmSpec(
            kl_coef=0.05, entropy_coef=0.01, loss_agg="seq-mean-token-mean", policy_loss=pushed, correction="none"
        ),
        sampling=SamplingSpec(n=4, max_response_length=6, keep=lambda rewards: len(rewards) == 4),
        evaluation=EvaluationSpec(
            files=(data,),
            freq=4,
            n=2,
            temperature=1.0,
            limit=16,
            also=(EvalSettingSpec(name="greedy"),),
            metrics=(lambda responses: {"sevens": sum(one.response.count(one.ground_truth) for one in responses) / letters},),
        ),
        reward=RewardSpec(
            functions=(
                RewardTerm(function=sevens, name="7", weight=2),
                RewardTerm(function=f"{rewards}:brief", weight=0.5),
            ),
            shaping=ShapingSpec(overlong_buffer=3, overlong_penalty=0.5, clip=(-0.25, 1.5)),
        ),
    )
    deployment = Deployment(generators=GeneratorsSpec(count=2), bus=BusSpec(transport="tcp", bucket_bytes=4096))
    callbacks = Callbacks(on_rollouts=told.append, on_update=told.append, on_eval=told.append, on_checkpoint=told.append)
    return launch(recipe, deployment, runs_dir=folder, callbacks=callbacks)


def test_a_run_with_everything_switched_on(everything, metrics_of):
    assert (everything.steps, everything.trained, everything.restarts) == (12, 48, {})
    assert everything.first_score is not None
    steps = metrics_of(everything.run_dir, "step")
    assert all(line["actor/optimizer_steps"] == 4 for line in steps)
    assert steps[-1]["actor/kl_loss"] > 0
    evals = metrics_of(everything.run_dir, "eval")
    assert [line["eval/count"] for line in evals] == [32.0] * len(evals)
    assert [line["eval/greedy/count"] for line in evals] == [16.0] * len(evals)
    assert all(0 <= line["eval/pass@2"] <= 1 and "eval/greedy/pass@1" not in line for line in evals)
    # The first term of the reward counts the same sevens, twice; the second is at most a half.
    assert all(0 <= line["eval/greedy/score"] - 2 * line["eval/greedy/metric/sevens"] <= 0.5 for line in evals)
    workers = {row["worker"] for row in open_replay(everything.run_dir).rollouts().to_pylist()}
    assert workers <= {"generator-0", "generator-1"}  # one that is up late may find all work done


def test_an_ended_run_leaves_every_rollout_in_files_of_parquet(everything, events_of):
    rows = pq.read_table(
        f"{everything.run_dir}/replay/rows", columns=["group", "rollout", "prompt", "response", "ground_truth"]
    )
    submitted = [(e.group, e.rollout) for e in events_of(everything.run_dir) if isinstance(e, ev.RolloutSubmitted)]
    assert list(zip(rows["group"].to_pylist(), rows["rollout"].to_pylist(), strict=True)) == submitted
    assert all(re.fullmatch(r"\d\d\+\d\d=", prompt) for prompt in rows["prompt"].to_pylist())
    assert len(set(rows["response"].to_pylist())) > 10
    assert set(rows["ground_truth"].to_pylist()) == {"7"}


def test_callbacks_are_told_of_everything_once_and_in_order(everything, told, metrics_of):
    records = [one for one in told if isinstance(one, Record)]
    lines = [line for line in metrics_of(everything.run_dir) if line["kind"] != "actors"]
    assert [(one.sequence, one.kind, one.version.update) for one in records] == [
        (line["sequence"], line["kind"], line["step"]) for line in lines
    ]
    assert [one.update for one in told if isinstance(one, SavedCheckpoint)] == [0, 3, 6, 9, 12]
    trained = [one.trained for one in told if isinstance(one, GroupCounts)]
    assert trained == sorted(trained)
    assert trained[-1] == 48


def test_functions_that_were_given_themselves_lie_in_the_run(everything):
    recipe = json.loads((Path(everything.run_dir) / "recipe.json").read_text())
    saved = sorted(path.name.partition("-")[0] for path in (Path(everything.run_dir) / "functions").iterdir())
    assert saved == ["lambda", "lambda", "pushed", "sevens"]
    assert recipe["reward"]["functions"][0]["function"].startswith(f"{everything.run_dir}/functions/sevens-")


def test_several_weighted_rewards_are_logged_by_name_and_shaped(everything, metrics_of):
    lines, clipped = metrics_of(everything.run_dir, "step"), 0
    assert len(lines) == 12
    for line in lines:
        assert {"reward/7", "reward/unshaped", "reward/overlong_penalty"} <= line.keys()
        assert 0 <= line["reward/brief"] <= 1
        assert -0.5 <= line["reward/overlong_penalty"] <= 0
    rewards = defaultdict(list)
    for row in open_replay(everything.run_dir).rollouts().to_pylist():
        if row["purpose"] == "train" and row["status"] == "ok":
            parts, length = dict(row["parts"]), len(row["response_ids"])
            assert ("brief" in parts) == (row["row"] % 2 == 0)
            assert parts["unshaped"] == pytest.approx(2 * parts["7"] + 0.5 * parts.get("brief", 0.0))
            assert parts["overlong_penalty"] == pytest.approx(-0.5 * max(length - 3, 0) / 3)
            sum_ = parts["unshaped"] + parts["overlong_penalty"]
            assert row["reward"] == pytest.approx(min(max(sum_, -0.25), 1.5))
            clipped += sum_ < -0.25
            rewards[row["trained_update"]].append(row["reward"])
    assert clipped
    for line in lines:
        assert line["reward/mean"] == pytest.approx(sum(rewards[line["step"]]) / 16)


# ------------------------------------------------------------------------------------------------ from objects


@pytest.fixture(scope="module")
def from_objects(local_ray, tiny_model, tmp_path_factory) -> dict:
    """A run of objects, two updates, evaluated between; then gone on with by its recipe.json alone, in the same program."""
    folder, six = tmp_path_factory.mktemp("objects"), 6.0

    def sevens(prompts, completions, **columns):  # TRL's, and a closure
        return [completion.count("7") / six for completion in completions]

    rows = [{"prompt": f"{i:02d}+{7 * i % 100:02d}="} for i in range(16)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    settings = {
        "sampling": SamplingSpec(n=4, max_response_length=6),
        "staleness": {"max_lag": 1},
        "learner": {"batch_groups": 4, "lr": 1e-3},
        "data": {"max_prompt_length": 8},
    }
    found: dict = {"start": model}
    with Trainer.from_objects(
        model, tokenizer, rows, sevens, eval_dataset=rows[:8], total_steps=4, runs_dir=folder, **settings
    ) as trainer:
        found["rate"] = [trainer.learning_rate]
        trainer.fit(1)
        found["first"] = trainer.evaluate()
        trainer.fit(1)
        found["evals"] = [trainer.evaluate(), trainer.evaluate()]
        found["rate"].append(trainer.learning_rate)
        found["steps"] = [trainer.global_step]
        found["exported"] = trainer.save_pretrained(folder / "out")
        trainer.save_checkpoint()
    recipe = msgspec.json.decode((folder / "run" / "recipe.json").read_bytes(), type=Recipe)
    with Trainer(recipe, name="run", runs_dir=folder, resume_from=folder / "run") as trainer:
        found["steps"].append(trainer.global_step)
        trainer.fit()
        found["steps"].append(trainer.global_step)
        trainer.finish()
        with pytest.raises(ConfigError, match="evaluate after `finish`"):
            trainer.evaluate()
    return found


def test_a_run_of_objects_trains_evaluates_and_goes_on_from_its_files(from_objects, metrics_of):
    assert from_objects["steps"] == [2, 2, 4]
    assert from_objects["rate"] == [None, 1e-3]
    exported = AutoModelForCausalLM.from_pretrained(from_objects["exported"]).state_dict()
    assert not any(torch.equal(tensor, exported[name]) for name, tensor in from_objects["start"].state_dict().items())
    lines = metrics_of(from_objects["exported"].parent / "run", "eval")
    assert [line["step"] for line in lines] == [0, 1, 2, 4]  # the second `evaluate` of the same weights made none
    scores = [line["eval/score"] for line in lines]
    assert from_objects["first"]["eval/score"] == scores[1]
    assert [metrics["eval/score"] for metrics in from_objects["evals"]] == [scores[2]] * 2
    assert from_objects["first"]["eval/count"] == 8
