"""What a run will write, against what is free: with made-up disks."""

import logging
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from asyncrl.cluster.space import check_space
from asyncrl.config import (
    AlgorithmSpec,
    CheckpointSpec,
    CriticSpec,
    DataSpec,
    Deployment,
    LearnerSpec,
    LoraSpec,
    ModelSpec,
    Recipe,
    RewardSpec,
    SamplingSpec,
    StoreSpec,
)
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir

MIB = 1 << 20


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs/r")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A model of a Mi parameters in bfloat16, in two files, trained in float32; the log takes 80 MiB at most."""
    (tmp_path / "model").mkdir()
    for number in range(2):
        save_file({f"{number}": torch.zeros(512, 1024, dtype=torch.bfloat16)}, tmp_path / f"model/{number}.safetensors")
    return Recipe(
        name="r",
        model=ModelSpec(path=f"{tmp_path}/model"),
        data=DataSpec(files=("train.jsonl",), max_prompt_length=128),
        reward=RewardSpec(function="rewards.py:score"),
        sampling=SamplingSpec(n=4, max_response_length=32),
        learner=LearnerSpec(batch_groups=8),
        checkpoint=CheckpointSpec(keep_last_n=2),
        total_steps=1024,
    )


def told(recipe: Recipe, run: RunDir, free_mib: float) -> str:
    return check_space(recipe, Deployment(), run, free=lambda path: int(free_mib * MIB))


def test_the_plan_has_what_the_run_writes(recipe: Recipe, run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    # weights and two moments in float32; two are kept while the third is written
    figures = "3 checkpoints of 12.0 MiB, and up to 82.0 MiB of log if every response is as long as it may be"
    assert told(recipe, run, 118) == f"118.0 MiB free; {figures}"
    assert not caplog.records
    assert told(recipe, run, 117) == f"117.0 MiB free; {figures}"
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.getMessage() == f"the disk of {run.path} may fill before the run ends: 117.0 MiB free; {figures}"
    for update in (50, 100):  # a run that is resumed
        run.create().checkpoint(update).mkdir()
    assert "; 1 checkpoints of 12.0 MiB" in told(recipe, run, 118)


def test_what_a_resume_needs_stays_beyond_the_bound_of_the_history(recipe: Recipe, run: RunDir) -> None:
    store = Deployment(store=StoreSpec(keep_bytes=0))
    often = check_space(replace(recipe, checkpoint=CheckpointSpec(save_freq=10, keep_last_n=2)), store, run)
    assert "up to 66.4 MiB of log" in often  # 30 updates of 82 KiB, and a segment
    assert "up to 82.0 MiB of log" in check_space(replace(recipe, checkpoint=CheckpointSpec(save_freq=500)), store, run)


def test_no_room_for_a_checkpoint_and_a_segment_is_an_error(recipe: Recipe, run: RunDir) -> None:
    with pytest.raises(
        ConfigError,
        match=r"75\.9 MiB are free for .*/runs/r < 76\.0 MiB, .*\(12\.0 MiB\).*segment_bytes=67108864\) .*--runs-dir",
    ):
        told(recipe, run, 75.9)


def test_a_critic_of_its_own_is_saved_too(recipe: Recipe, run: RunDir) -> None:
    gae = AlgorithmSpec(adv_estimator="gae")
    assert "3 checkpoints of 24.0 MiB" in told(replace(recipe, algorithm=gae), run, 1000)
    shared = replace(recipe, algorithm=gae, critic=CriticSpec(backbone="shared"))
    assert "3 checkpoints of 12.0 MiB" in told(shared, run, 1000)


def test_adapters_need_no_room_for_the_model(recipe: Recipe, run: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"which one checkpoint \(12\.0 MiB\)"):
        told(recipe, run, 70)
    lora = replace(recipe, learner=replace(recipe.learner, lora=LoraSpec()))
    assert "checkpoints of a size not known yet" in told(lora, run, 70)


def test_a_model_that_is_elsewhere_has_no_size_yet_and_a_damaged_one_is_named(recipe: Recipe, run: RunDir) -> None:
    assert "free; checkpoints of a size not known yet" in told(replace(recipe, model=ModelSpec(path="Qwen/Qwen3")), run, 1000)
    Path(recipe.model.path, "1.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match=r"1\.safetensors is no readable safetensors file"):
        told(recipe, run, 1000)
