"""Which file a recipe's text names."""

import math
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from asyncrl.config import (
    AlgorithmSpec,
    CriticSpec,
    DataSpec,
    EvaluationSpec,
    ModelSpec,
    Recipe,
    RewardSpec,
    RewardTerm,
    SamplingSpec,
)
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        name="r",
        model=ModelSpec(path="{run}/data/model", tokenizer="Qwen/Qwen3-0.6B"),
        data=DataSpec(files=("{run}/data/train.parquet", "extra.jsonl")),
        reward=RewardSpec(function="rewards.py:score"),
        sampling=SamplingSpec(keep="varied"),
        algorithm=AlgorithmSpec(policy_loss="own.py:loss"),
        evaluation=EvaluationSpec(files=("{run}/data/heldout.parquet",)),
        prepare="package.module:prepare",
        total_steps=1,
    )


def test_a_number_without_end_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    """The run's recipe.json would hold null in its place, and the run could not be resumed."""
    endless = replace(recipe, algorithm=AlgorithmSpec(masks=("icepop",), icepop_bounds=(0.5, math.inf)))
    with pytest.raises(ConfigError, match=r"algorithm\.icepop_bounds holds inf: only finite numbers"):
        resolve_paths(endless, RunDir(tmp_path / "run"))


def test_the_run_directory_and_the_recipes_folder(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    resolved = resolve_paths(recipe, RunDir("runs/a b"), tmp_path / "recipes")
    assert resolved.model.path == f"{tmp_path}/runs/a b/data/model"
    assert resolved.model.tokenizer == "Qwen/Qwen3-0.6B"  # a hub id stays one
    assert resolved.data.files == (f"{tmp_path}/runs/a b/data/train.parquet", f"{tmp_path}/recipes/extra.jsonl")
    assert resolved.evaluation.files == (f"{tmp_path}/runs/a b/data/heldout.parquet",)
    assert resolved.reward.function == f"{tmp_path}/recipes/rewards.py:score"
    assert resolved.prepare == "package.module:prepare"
    assert resolved.sampling.keep == "varied"
    assert resolved.algorithm.policy_loss == f"{tmp_path}/recipes/own.py:loss"
    assert resolved.algorithm.adv_estimator == "grpo"
    assert resolve_paths(resolved, RunDir("elsewhere"), "/") == resolved


def test_the_recipes_folder_goes_before_the_working_directory(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (beside, here):
        (folder / "model").mkdir(parents=True)
        (folder / "extra.jsonl").touch()
    (here / "rewards.py").touch()
    monkeypatch.chdir(here)
    recipe = msgspec.structs.replace(recipe, model=ModelSpec(path="model"))
    resolved = resolve_paths(recipe, RunDir("runs/a"), beside)
    assert resolved.model.path == str(beside / "model")
    assert resolved.data.files[1] == str(beside / "extra.jsonl")
    assert resolved.reward.function == f"{here}/rewards.py:score"  # only there
    assert resolve_paths(recipe, RunDir("runs/a")).model.path == str(here / "model")


def test_every_reward_function_is_found(recipe: Recipe, tmp_path: Path) -> None:
    terms = (RewardTerm(function="rewards.py:score", weight=2.0), RewardTerm(function="package.module:score", name="other"))
    several = msgspec.structs.replace(recipe, reward=RewardSpec(functions=terms))
    found = resolve_paths(several, RunDir("runs/a"), tmp_path).reward.functions
    assert [term.function for term in found] == [f"{tmp_path}/rewards.py:score", "package.module:score"]


def test_a_critics_model_is_found_like_the_policys(recipe: Recipe, tmp_path: Path) -> None:
    critic = CriticSpec(model=ModelSpec(path="./critic"))
    recipe = msgspec.structs.replace(recipe, algorithm=AlgorithmSpec(adv_estimator="gae"), critic=critic)
    resolved = resolve_paths(recipe, RunDir(tmp_path / "run"), tmp_path).critic.model
    assert resolved == ModelSpec(path=f"{tmp_path}/critic")


def test_builders_are_found_beside_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    built = ModelSpec(path="m", builder="mine.py:make")
    gae = AlgorithmSpec(adv_estimator="gae")
    both = replace(recipe, model=built, algorithm=gae, critic=CriticSpec(model=built))
    found = resolve_paths(both, RunDir(tmp_path / "run"), tmp_path)
    assert (found.model.builder, found.critic.model.builder) == (f"{tmp_path}/mine.py:make",) * 2
