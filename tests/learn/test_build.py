"""Which models a recipe loads for its learner."""

from pathlib import Path

import pytest
import torch

from asyncrl.config import (
    AlgorithmSpec,
    CriticSpec,
    DataSpec,
    Layout,
    LearnerSpec,
    LoraSpec,
    ModelSpec,
    PrecisionSpec,
    Recipe,
    RewardSpec,
)
from asyncrl.errors import ConfigError
from asyncrl.learn.build import policy_trainer
from asyncrl.models.loading import named_weights
from asyncrl.models.ranks import Ranks
from asyncrl.models.shards import same_bits
from asyncrl.types import TrainRollout


@pytest.fixture
def make_recipe(tmp_path: Path, make_model):
    def build(critic: CriticSpec | None, vocabulary: int = 16, learner: LearnerSpec = LearnerSpec(batch_groups=4), **algorithm):
        make_model().save_pretrained(tmp_path / "policy")
        other = make_model(seed=1)
        other.resize_token_embeddings(vocabulary)
        other.save_pretrained(tmp_path / "other")
        return Recipe(
            name="r",
            model=ModelSpec(path=str(tmp_path / "policy")),
            data=DataSpec(files=("f",)),
            reward=RewardSpec(function="m:f"),
            algorithm=AlgorithmSpec(**({} if critic is None else {"adv_estimator": "gae"}), **algorithm),
            learner=learner,
            critic=critic or CriticSpec(),
            total_steps=9,
        )

    return build


@pytest.fixture
def make(make_recipe, tmp_path: Path):
    return lambda *args, **fields: policy_trainer(make_recipe(*args, **fields), device="cpu", refused_dir=tmp_path / "refused")


def test_without_gae_there_is_no_critic(make) -> None:
    assert make(None).critic is None


def test_an_own_critic_starts_from_the_policy_or_from_its_model(make, make_model, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for spec, seed in ((CriticSpec(), 0), (CriticSpec(model=ModelSpec(path=str(tmp_path / "other"))), 1)):
        trainer = make(spec)
        assert trainer.trained["critic"].module.get_parameter(name).equal(make_model(seed=seed).get_parameter(name))
        assert trainer.trained["critic"].module.get_parameter(name) is not trainer.model.get_parameter(name)
        assert trainer.trained["critic"].module.lm_head.weight.shape == (1, 16)


def test_a_shared_critic_is_a_head_and_trains_with_the_policy(make, make_rollouts) -> None:
    trainer = make(CriticSpec(backbone="shared", lr=1e-2), kl_coef=0.01)
    assert sum(parameter.numel() for parameter in trainer.trained["critic"].module.parameters()) == 17
    metrics = trainer.update(make_rollouts(), 1)
    assert (metrics["actor/optimizer_steps"], metrics["critic/optimizer_steps"]) == (1.0, 1.0)
    assert not trainer.trained["critic"].module.weight.equal(torch.zeros(1, 16))


def in_bfloat16(ranks: Ranks, recipe: Recipe, rollouts: list[TrainRollout], folder: Path) -> tuple[object, ...]:
    """Dtypes of the policy, the reference, the critic and AdamW; the KL in the loss of the first step."""
    trainer = policy_trainer(recipe, device="cpu", refused_dir=folder, ranks=ranks)
    dtypes = [model.dtype for model in (trainer.model, trainer.reference.model, trainer.trained["critic"].module)]
    metrics = trainer.update(rollouts, 1)
    return (
        dtypes,
        trainer.trained["policy"].adamw.state[next(trainer.model.parameters())]["exp_avg"].dtype,
        metrics["actor/kl_loss"],
    )


def test_only_what_learns_rests_in_float32_when_bfloat16_computes(make_recipe, gang, make_rollouts, tmp_path: Path) -> None:
    """To the bit the starting policy: both round their weights alike."""
    learner = LearnerSpec(batch_groups=4, precision=PrecisionSpec(compute="bfloat16"))
    recipe = make_recipe(CriticSpec(), learner=learner, kl_coef=0.1)
    for layout in (Layout(), Layout(shard=2)):
        for found in gang(layout, in_bfloat16, recipe, make_rollouts(), tmp_path):
            assert found == ([torch.float32, torch.bfloat16, torch.float32], torch.float32, 0.0)


def test_a_critic_that_cannot_read_every_token_is_refused(make, tmp_path: Path) -> None:
    critic = CriticSpec(model=ModelSpec(path=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match=r"critic\.model\.path='.*other' knows 12 tokens, the policy 16"):
        make(critic, vocabulary=12)


def test_with_lora_adapters_alone_learn_and_the_reference_is_what_they_were_added_to(make, make_model, make_rollouts) -> None:
    lora = LearnerSpec(batch_groups=4, lr=1e-2, lora=LoraSpec(rank=2))
    trainer, whole = make(CriticSpec(), learner=lora, kl_coef=0.1), make(CriticSpec(), kl_coef=0.1)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    learned = [names[parameter] for parameter in trainer.trained["policy"].adamw.param_groups[0]["params"]]
    assert len(learned) == 2 * 7 * 2  # A and B of seven matrices in each of two layers
    assert all(".lora_" in name for name in learned)
    assert len(trainer.trained["critic"].adamw.param_groups[0]["params"]) == len(
        whole.trained["critic"].adamw.param_groups[0]["params"]
    )

    first, expected = trainer.update(make_rollouts(), 0), whole.update(make_rollouts(), 0)
    assert first["actor/kl_loss"] == expected["actor/kl_loss"] == 0.0
    second = trainer.update(make_rollouts(), 1)
    assert second["actor/kl_loss"] > 1e-6  # the policy moves away from its reference
    weights, before = named_weights(trainer.model), named_weights(make_model())
    assert all(same_bits(weights[name], before[name]) for name in weights.keys() & before.keys())
    assert sum(".base_layer." in name for name in weights) == 14
    for name, tensor in before.items():
        inside = f"{name.removesuffix('.weight')}.base_layer.weight"
        assert same_bits(weights[inside if inside in weights else name], tensor)
