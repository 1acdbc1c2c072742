"""Before its first update a run finds out that its engine is not the learner's policy, and what its reward says."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from asyncrl import Trainer, launch
from asyncrl.config import Deployment, GeneratorsSpec, ModelSpec, RewardSpec
from asyncrl.errors import ConfigError

pytestmark = pytest.mark.ray

# As the folder says; but where a generator is, tokens turn by other angles, which are no weights and so never travel.
BUILDER = """
import inspect
from transformers import AutoModelForCausalLM

def make(spec):
    model = AutoModelForCausalLM.from_pretrained(spec.path)
    if any("asyncrl/generate/" in frame.filename for frame in inspect.stack()):
        model.model.rotary_emb.inv_freq.mul_(0.25)
    return model
"""
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    raise ValueError("this one never works")
"""


def other_engine(folder: Path, recipe: Any) -> Any:
    (folder / "builder.py").write_text(BUILDER)
    model = ModelSpec(path=recipe.model.path, builder=f"{folder / 'builder.py'}:make")
    return replace(recipe, model=model)


def test_an_engine_that_is_another_policy_ends_the_run_before_its_first_update(
    local_ray: None, tiny_recipe: Any, tmp_path: Path
) -> None:
    recipe = other_engine(tmp_path, tiny_recipe())
    with pytest.raises(ConfigError, match=r"generator-0 and the learner are not the same policy: .* 0\.0001 allowed"):
        launch(recipe, runs_dir=tmp_path)
    facts = json.loads((tmp_path / "tiny" / "facts.json").read_text())
    assert facts["agreement"]["mean"] > 1e-3
    assert not any(
        json.loads(line)["kind"] == "step" for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    )


def test_it_goes_on_where_any_gap_is_allowed_and_looks_again_when_resumed(
    local_ray: None, tiny_recipe: Any, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, logger="asyncrl")
    recipe, deployment = other_engine(tmp_path, tiny_recipe(total_steps=2)), Deployment(generators=GeneratorsSpec(max_gap=None))
    with Trainer(recipe, deployment, runs_dir=tmp_path) as trainer:
        trainer.fit(1)
        trainer.save_checkpoint()
    facts = [json.loads(trainer.paths.facts.read_text())]
    with Trainer(recipe, deployment, runs_dir=tmp_path, resume_from=trainer.paths.path) as trainer:
        trainer.fit()
        trainer.finish()
    facts.append(json.loads(trainer.paths.facts.read_text()))
    assert [one["version"][1] for one in facts] == [0, 1]
    assert all(one["agreement"]["mean"] > 1e-3 and one["verdict"]["status"] == "ok" for one in facts)
    names = [actor["name"] for actor in facts[1]["actors"]]
    assert names == ["learner", "generator-0", "reward-0"]
    learner, generator, _ = (actor["holds"] for actor in facts[1]["actors"])
    assert learner["policy_moments_bytes"] == 2 * learner["policy_bytes"] == 2 * generator["weights_bytes"] > 0
    lines = [line for line in caplog.messages if "first answer (generator-0" in line]
    assert len(lines) == 2


def test_a_reward_that_fails_on_the_first_answer_is_said_before_the_run_ends_of_it(
    local_ray: None, tiny_recipe: Any, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "broken.py").write_text(REWARD)
    recipe = tiny_recipe(reward=RewardSpec(function=f"{tmp_path / 'broken.py'}:compute_score"))
    with pytest.raises(ConfigError, match="this one never works"):
        launch(recipe, runs_dir=tmp_path)
    assert "the reward failed on the first answer (invalid): ValueError: this one never works" in caplog.text
