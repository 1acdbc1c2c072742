"""From a recipe to its trainer: which models it loads, and for what."""

from pathlib import Path

from transformers import PreTrainedModel

from asyncrl.config import Recipe
from asyncrl.errors import ConfigError
from asyncrl.learn.critic import Critic
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.learn.update import RefusedSteps
from asyncrl.models.loading import load_model
from asyncrl.models.lora import WithoutAdapters, add_adapters
from asyncrl.models.packed import PackedModel
from asyncrl.models.value import OwnValues, SharedValues


def policy_trainer(recipe: Recipe, *, device: str, refused_dir: Path) -> PolicyTrainer:
    """The policy; where needed its frozen reference; with GAE the critic. refused_dir: for batches of refused steps."""
    policy, temperature = load_model(recipe.model, device), recipe.sampling.temperature
    if recipe.learner.lora is not None:
        add_adapters(policy, recipe.learner.lora, recipe.model, recipe.seed)
    return PolicyTrainer(
        PackedModel(policy, temperature),
        recipe.learner,
        recipe.algorithm,
        recipe.staleness_rule(),
        total_steps=recipe.total_steps,
        refused_dir=refused_dir,
        reference=_reference(recipe, policy, device) if recipe.algorithm.needs_reference else None,
        critic=_critic(recipe, policy, device, refused_dir / "critic") if recipe.algorithm.needs_critic else None,
    )


def _reference(recipe: Recipe, policy: PreTrainedModel, device: str) -> PackedModel:
    """A copy of the starting policy; under adapters it is there already."""
    if recipe.learner.lora is not None:
        return WithoutAdapters(policy, recipe.sampling.temperature)
    return PackedModel(load_model(recipe.model, device), recipe.sampling.temperature)


def _critic(recipe: Recipe, policy: PreTrainedModel, device: str, refused_dir: Path) -> Critic:
    spec, refused = recipe.critic, RefusedSteps(refused_dir, recipe.learner.max_refused_steps)
    if spec.backbone == "shared":
        return Critic(SharedValues(policy), spec, refused, total_steps=recipe.total_steps)
    start, field = (spec.model, "critic.model") if spec.model else (recipe.model, "model")
    model = load_model(start, device, field)
    own, needed = model.get_input_embeddings().weight.shape[0], policy.get_input_embeddings().weight.shape[0]
    if own < needed:
        raise ConfigError(
            f"{field}.path={start.path!r} knows {own} tokens, the policy {needed}: it can not read every rollout; use a model "
            "with the policy's tokenizer"
        )
    return Critic(OwnValues(model), spec, refused, total_steps=recipe.total_steps)
