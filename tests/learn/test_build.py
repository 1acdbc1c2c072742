"""Which models a recipe loads for its learner."""

from pathlib import Path

import pytest
import torch

from asyncrl.config import AlgorithmSpec, CriticSpec, DataSpec, LearnerSpec, ModelSpec, Recipe, RewardSpec
from asyncrl.errors import ConfigError
from asyncrl.learn.build import policy_trainer


@pytest.fixture
def make(tmp_path: Path, make_model):
    def build(critic: CriticSpec | None, vocabulary: int = 16, **algorithm: object):
        make_model().save_pretrained(tmp_path / "policy")
        other = make_model(seed=1)
        other.resize_token_embeddings(vocabulary)
        other.save_pretrained(tmp_path / "other")
        recipe = Recipe(
            name="r",
            model=ModelSpec(path=str(tmp_path / "policy")),
            data=DataSpec(files=("f",)),
            reward=RewardSpec(function="m:f"),
            algorithm=AlgorithmSpec(**({} if critic is None else {"adv_estimator": "gae"}), **algorithm),
            learner=LearnerSpec(batch_groups=4),
            critic=critic or CriticSpec(),
            total_steps=9,
        )
        return policy_trainer(recipe, device="cpu", refused_dir=tmp_path / "refused")

    return build


def test_without_gae_there_is_no_critic(make) -> None:
    assert make(None).critic is None


def test_an_own_critic_starts_from_the_policy_or_from_its_model(make, make_model, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for spec, seed in ((CriticSpec(), 0), (CriticSpec(model=ModelSpec(path=str(tmp_path / "other"))), 1)):
        trainer = make(spec)
        assert trainer.critic.module.get_parameter(name).equal(make_model(seed=seed).get_parameter(name))
        assert trainer.critic.module.get_parameter(name) is not trainer.model.get_parameter(name)
        assert trainer.critic.module.lm_head.weight.shape == (1, 16)


def test_a_shared_critic_is_a_head_and_trains_with_the_policy(make, make_rollouts) -> None:
    trainer = make(CriticSpec(backbone="shared", lr=1e-2), kl_coef=0.01)
    assert sum(parameter.numel() for parameter in trainer.critic.module.parameters()) == 17
    metrics = trainer.update(make_rollouts(), 1)
    assert (metrics["actor/optimizer_steps"], metrics["critic/optimizer_steps"]) == (1.0, 1.0)
    assert not trainer.critic.module.weight.equal(torch.zeros(1, 16))


def test_a_critic_that_cannot_read_every_token_is_refused(make, tmp_path: Path) -> None:
    critic = CriticSpec(model=ModelSpec(path=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match=r"critic\.model\.path='.*other' knows 12 tokens, the policy 16"):
        make(critic, vocabulary=12)
