"""From a recipe to its trainer: which models it loads, and for what."""

from pathlib import Path

from msgspec.structs import replace

from asyncrl.config import AlgorithmSpec, Recipe
from asyncrl.errors import ConfigError
from asyncrl.learn.critic import Critic
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.learn.update import RefusedSteps
from asyncrl.models.loading import context, load_model
from asyncrl.models.lora import WithoutAdapters, add_adapters
from asyncrl.models.packed import PackedModel
from asyncrl.models.ranks import Ranks
from asyncrl.models.sharding import shard
from asyncrl.models.value import OwnValues, SharedValues, value_model


def policy_trainer(recipe: Recipe, *, device: str, refused_dir: Path, ranks: Ranks | None = None) -> PolicyTrainer:
    """The policy; where needed its frozen reference; with GAE the critic. refused_dir: for batches of refused steps.

    ranks: among which all of them are divided; each must call this, and waits for all others.
    """
    ranks = ranks or Ranks()
    policy = _policy(recipe, device, ranks) if ranks.holds("learner") else None
    referred = recipe.algorithm.needs_reference and ranks.holds("reference")
    return PolicyTrainer(
        policy,
        recipe.learner,
        recipe.algorithm,
        recipe.staleness_rule(),
        total_steps=recipe.total_steps,
        refused_dir=refused_dir,
        reference=reference_model(recipe, policy, device, ranks) if referred else None,
        critic=_critic(recipe, policy, device, ranks, refused_dir / "critic") if recipe.algorithm.needs_critic else None,
    )


def _policy(recipe: Recipe, device: str, ranks: Ranks) -> PackedModel:
    policy = load_model(recipe.model, ranks=ranks)
    if recipe.learner.lora is not None:
        add_adapters(policy, recipe.learner.lora, recipe.model, recipe.seed, ranks)
    shard(policy, ranks, recipe.learner.precision, device)
    return PackedModel(policy, recipe.sampling.temperature, ranks)


def other_trainer(recipe: Recipe, own: PolicyTrainer, algorithm: AlgorithmSpec, reference: PackedModel | None) -> PolicyTrainer:
    """One with another algorithm and the models of `own`, which alone may step. reference: where the algorithm asks for one."""
    assert own.actor is not None, "asked of a rank without the policy"
    return PolicyTrainer(
        own.actor.policy,
        recipe.learner,
        algorithm,
        recipe.staleness_rule(),
        total_steps=recipe.total_steps,
        refused_dir=Path(),
        reference=reference,
        critic=own.critic if algorithm.needs_critic else None,
    )


def reference_model(recipe: Recipe, policy: PackedModel | None, device: str, ranks: Ranks) -> PackedModel:
    """A copy of the starting policy; under adapters it is there already."""
    if recipe.learner.lora is not None and policy is not None:
        return WithoutAdapters(policy.model, recipe.sampling.temperature, ranks)
    # Nothing is ever added to its weights, so these need no more digits than the compute has.
    compute = recipe.learner.precision.compute_of(recipe.model.dtype, gpu=device == "cuda")
    reference = load_model(replace(recipe.model, dtype=compute), ranks=ranks)
    shard(reference, ranks, recipe.learner.precision, device)
    return PackedModel(reference, recipe.sampling.temperature, ranks)


def _critic(recipe: Recipe, policy: PackedModel | None, device: str, ranks: Ranks, refused_dir: Path) -> Critic:
    spec, refused = recipe.critic, RefusedSteps(refused_dir, recipe.learner.max_refused_steps, ranks.leads)
    return Critic(_values(recipe, policy, device, ranks), spec, refused, total_steps=recipe.total_steps)


def _values(recipe: Recipe, policy: PackedModel | None, device: str, ranks: Ranks) -> OwnValues | SharedValues | None:
    """What the critic reads values from; None where other ranks have it."""
    if not ranks.holds("critic"):
        return None
    if recipe.critic.backbone == "shared" and policy is not None:
        return SharedValues(policy.model, ranks)
    start, field = (recipe.critic.model, "critic.model") if recipe.critic.model else (recipe.model, "model")
    model = load_model(start, field=field, ranks=ranks)
    own, needed = model.get_input_embeddings().weight.shape[0], context(recipe.model)[0]
    if own < needed:
        raise ConfigError(
            f"{field}.path={start.path!r} knows {own} tokens, the policy {needed}: it can not read every rollout; use a model "
            "with the policy's tokenizer"
        )
    shard(value_model(model), ranks, recipe.learner.precision, device)
    return OwnValues(model, ranks)
