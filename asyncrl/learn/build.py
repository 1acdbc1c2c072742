"""From a recipe to its trainer: which models it loads, and for what."""

from pathlib import Path

from msgspec.structs import replace
from transformers import PreTrainedModel

from asyncrl.config import Recipe
from asyncrl.errors import ConfigError
from asyncrl.learn.critic import Critic
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.learn.update import RefusedSteps
from asyncrl.models.loading import load_model
from asyncrl.models.lora import WithoutAdapters, add_adapters
from asyncrl.models.packed import PackedModel
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard
from asyncrl.models.value import OwnValues, SharedValues, value_model


def policy_trainer(recipe: Recipe, *, device: str, refused_dir: Path, ranks: Ranks | None = None) -> PolicyTrainer:
    """The policy; where needed its frozen reference; with GAE the critic. refused_dir: for batches of refused steps.

    ranks: among which all of them are divided; each must call this, and waits for all others.
    """
    ranks, temperature = ranks or Ranks(), recipe.sampling.temperature
    policy = load_model(recipe.model)
    if recipe.learner.lora is not None:
        add_adapters(policy, recipe.learner.lora, recipe.model, recipe.seed)
    shard(policy, ranks, recipe.learner.precision, device)
    return PolicyTrainer(
        PackedModel(policy, temperature, ranks),
        recipe.learner,
        recipe.algorithm,
        recipe.staleness_rule(),
        total_steps=recipe.total_steps,
        refused_dir=refused_dir,
        reference=_reference(recipe, policy, device, ranks) if recipe.algorithm.needs_reference else None,
        critic=_critic(recipe, policy, device, ranks, refused_dir / "critic") if recipe.algorithm.needs_critic else None,
    )


def _reference(recipe: Recipe, policy: PreTrainedModel, device: str, ranks: Ranks) -> PackedModel:
    """A copy of the starting policy; under adapters it is there already."""
    if recipe.learner.lora is not None:
        return WithoutAdapters(policy, recipe.sampling.temperature, ranks)
    # Nothing is ever added to its weights, so these need no more digits than the compute has.
    compute = recipe.learner.precision.compute_of(recipe.model.dtype, gpu=device == "cuda")
    reference = load_model(replace(recipe.model, dtype=compute))
    shard(reference, ranks, recipe.learner.precision, device)
    return PackedModel(reference, recipe.sampling.temperature, ranks)


def _critic(recipe: Recipe, policy: PreTrainedModel, device: str, ranks: Ranks, refused_dir: Path) -> Critic:
    spec, refused = recipe.critic, RefusedSteps(refused_dir, recipe.learner.max_refused_steps, ranks.first)
    if spec.backbone == "shared":
        return Critic(SharedValues(policy, ranks), spec, refused, total_steps=recipe.total_steps)
    start, field = (spec.model, "critic.model") if spec.model else (recipe.model, "model")
    model = load_model(start, field=field)
    own, needed = model.get_input_embeddings().weight.shape[0], policy.get_input_embeddings().weight.shape[0]
    if own < needed:
        raise ConfigError(
            f"{field}.path={start.path!r} knows {own} tokens, the policy {needed}: it can not read every rollout; use a model "
            "with the policy's tokenizer"
        )
    shard(value_model(model), ranks, recipe.learner.precision, device)
    return Critic(OwnValues(model, ranks), spec, refused, total_steps=recipe.total_steps)
