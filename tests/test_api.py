"""Trainer and launch from Python, on the tiny model under real Ray."""

import os
import signal
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl import Trainer, launch
from asyncrl.config import AlgorithmSpec, BusSpec, CheckpointSpec, Deployment, EvaluationSpec, GeneratorsSpec, LearnerSpec
from asyncrl.errors import ConfigError, DataError
from asyncrl.replay import open as open_replay

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_trainer_led_step_by_step(local_ray, tiny_recipe, tmp_path):
    learner, kept = LearnerSpec(batch_groups=4, lr=1e-2), CheckpointSpec(save_freq=50, keep_last_n=4)
    recipe = tiny_recipe(total_steps=20, learner=learner, checkpoint=kept)
    with Trainer(recipe, runs_dir=tmp_path) as trainer:
        assert trainer.fit(2).steps == 2
        checkpoint = trainer.save_checkpoint()
        trainer.export(tmp_path / "at-2")
        assert trainer.fit(3).steps == 5
        trainer.export(tmp_path / "at-5")
        trainer.load_checkpoint(checkpoint)
        trainer.export(tmp_path / "again-2")
        result = trainer.fit(3)
    assert (result.steps, result.samples) == (5, 5 * 16)
    at_2, at_5, again_2 = (weights_of(tmp_path / name) for name in ("at-2", "at-5", "again-2"))
    assert all(torch.equal(tensor, again_2[name]) for name, tensor in at_2.items())
    assert not any(torch.equal(tensor, at_5[name]) for name, tensor in at_2.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "at-5").chat_template


def test_a_run_with_everything_switched_on(local_ray, tiny_recipe, metrics_of, tmp_path):
    """Two generators over TCP, minibatches, epochs, KL to the reference, entropy bonus, evaluation of several samples."""
    data = tiny_recipe().data.files[0]
    recipe = tiny_recipe(
        total_steps=12,
        learner=LearnerSpec(batch_groups=4, mini_batch_groups=2, ppo_epochs=2, lr=1e-3, lr_schedule="cosine", warmup_steps=2),
        algorithm=AlgorithmSpec(kl_coef=0.05, entropy_coef=0.01, clip_ratio_high=0.28, loss_agg="seq-mean-token-mean"),
        evaluation=EvaluationSpec(files=(data,), freq=4, n=2, temperature=1.0, limit=16),
    )
    deployment = Deployment(generators=GeneratorsSpec(count=2), bus=BusSpec(transport="tcp", bucket_bytes=4096))
    result = launch(recipe, deployment, runs_dir=tmp_path)
    assert (result.steps, result.trained, result.restarts) == (12, 48, {})
    assert result.first_score is not None
    steps = metrics_of(result.run_dir, "step")
    assert all(line["actor/optimizer_steps"] == 4 for line in steps)
    assert steps[-1]["actor/kl_loss"] > 0
    evals = metrics_of(result.run_dir, "eval")
    assert [line["eval/count"] for line in evals] == [32.0] * len(evals)
    workers = {row["worker"] for row in open_replay(tmp_path / "tiny").rollouts().to_pylist()}
    assert workers <= {"generator-0", "generator-1"}  # one that is up late may find all work done


def test_resuming_asks_for_the_same_groups_and_a_new_run_sets_the_old_aside(local_ray, tiny_recipe, tmp_path):
    recipe = tiny_recipe(total_steps=2)
    launch(recipe, runs_dir=tmp_path)
    recorded = (tmp_path / "tiny" / "recipe.json").read_bytes()
    with pytest.raises(ConfigError, match=r"seed=1, but it began with 0"):
        launch(tiny_recipe(total_steps=4, seed=1), runs_dir=tmp_path, resume=True)
    data = Path(recipe.data.files[0])
    before = data.read_text()
    data.write_text(before.replace("00+00=", "01+01="))
    for _ in range(2):  # a refused attempt must not make the next one pass
        with pytest.raises(DataError, match="changed since"):
            launch(replace(recipe, total_steps=4), runs_dir=tmp_path, resume=True)
    assert (tmp_path / "tiny" / "recipe.json").read_bytes() == recorded
    data.write_text(before)
    with pytest.raises(ConfigError, match=r"is no checkpoint of the run(.|\n)*step_000002"):
        Trainer(recipe, runs_dir=tmp_path, resume_from=tmp_path / "other" / "step_000001")
    with pytest.raises(ConfigError, match="no checkpoint"):
        launch(recipe, name="fresh", runs_dir=tmp_path, resume=True)
    assert launch(replace(recipe, total_steps=4), runs_dir=tmp_path, resume=True).steps == 4

    assert launch(recipe, runs_dir=tmp_path).steps == 2
    assert (tmp_path / "tiny" / "previous-1" / "checkpoints" / "step_000004").is_dir()


def test_a_learner_that_dies_between_two_fits_is_replaced(local_ray, tiny_recipe, tmp_path):
    pids = {}
    with Trainer(tiny_recipe(total_steps=20), runs_dir=tmp_path, observe=lambda run: pids.update(run.pids)) as trainer:
        trainer.fit(3)
        os.kill(pids["learner"], signal.SIGKILL)
        result = trainer.fit(3)
    assert (result.steps, result.samples, result.restarts) == (6, 6 * 16, {"learner": 1})
