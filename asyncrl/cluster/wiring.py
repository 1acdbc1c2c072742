"""From specs to stages. The one place that knows every stage's constructor; each function runs inside its actor."""

import hashlib
import time
from collections.abc import Callable
from typing import Any

from asyncrl.callables import load_callable
from asyncrl.cluster.actors import Stage
from asyncrl.cluster.peers import Peers
from asyncrl.cluster.plan import Plan
from asyncrl.cluster.transport import RayCall
from asyncrl.config import DataSpec, Recipe
from asyncrl.rundir import RunDir
from asyncrl.types import Sampling

Built = tuple[Stage, Any]  # the stage, and what its peers need to know of it


# ------------------------------------------------------------------------------------- before the actors, in the driver


def run_id(paths: RunDir) -> str:
    """Names a run's shared memory: the same for every start in one run directory, different between directories."""
    return hashlib.blake2b(str(paths.path).encode(), digest_size=6).hexdigest()


def prepare_prompts(recipe: Recipe, paths: RunDir) -> tuple[int, ...]:
    """Tokenizes train and held-out prompts into the run directory, once; returns the tokens that end an answer."""
    from asyncrl.models.loading import load_tokenizer, stop_token_ids
    from asyncrl.prompts.dataset import prepare
    from asyncrl.prompts.encoding import encoder, identity

    tokenizer = load_tokenizer(recipe.model)
    encode, tokenizer_id = encoder(tokenizer), identity(tokenizer)
    prepare(recipe.data, encode, paths.data / "train.arrow", tokenizer_id)
    if recipe.evaluation.files:
        prepare(_eval_data(recipe), encode, paths.data / "eval.arrow", tokenizer_id)
    return stop_token_ids(tokenizer, recipe.model)


def sweep(plan: Plan) -> None:
    """Removes what killed processes of this run left in shared memory."""
    from asyncrl.weights import shm

    shm.sweep(shm.default_folder(), plan.run_id)


def _eval_data(recipe: Recipe) -> DataSpec:
    from msgspec.structs import replace

    return replace(recipe.data, files=recipe.evaluation.files, shuffle=False, epochs=None)


# -------------------------------------------------------------------------------------------------------- the store


def build_store(plan: Plan) -> Any:
    """Opens the log of the run directory, or rebuilds the store from it."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------- the stages


def build(role: str, name: str, plan: Plan, peers: Peers, threads: int) -> Built:
    """Builds a stage of `role` in the calling process."""
    builders: dict[str, Callable[[str, Plan, Peers], Built]] = {
        "generator": _generator,
        "reward": _reward,
        "learner": _learner,
    }
    if role != "reward":
        import torch

        torch.set_num_threads(threads)
    return builders[role](name, plan, peers)


def _client(name: str, plan: Plan, peers: Peers) -> Any:
    from asyncrl.replay.client import ReplayClient

    limits = plan.deployment.limits
    call = RayCall(peers, patience_s=limits.start_timeout_s)
    return ReplayClient(call, name, incarnation=time.time_ns())


def _generator(name: str, plan: Plan, peers: Peers) -> Built:
    from asyncrl.generate.generator import Generator
    from asyncrl.generate.torch_engine import TorchEngine
    from asyncrl.models.loading import load_model
    from asyncrl.weights.subscriber import WeightSubscriber

    spec, bus, place = plan.deployment.generators.engine, plan.deployment.bus, plan.deployment.generators.place
    model = load_model(plan.recipe.model, device="cuda" if place.gpus else "cpu")
    engine = TorchEngine(
        model,
        slots=spec.slots,
        max_length=spec.max_length,
        update_mode=spec.update_mode,
        deterministic=spec.deterministic,
    )
    weights = WeightSubscriber(lambda: peers.peek("bus"), credit=bus.credit, transport=bus.transport)
    store = _client(name, plan, peers)
    return Generator(engine, store, weights, name=name, poll_s=plan.deployment.limits.poll_s), None


def _reward(name: str, plan: Plan, peers: Peers) -> Built:
    from asyncrl.models.loading import load_tokenizer
    from asyncrl.reward.pool import RewardPool
    from asyncrl.reward.worker import RewardWorker

    spec, rewards = plan.recipe.reward, plan.deployment.rewards
    tokenizer = load_tokenizer(plan.recipe.model)
    pool: RewardPool[Any] = RewardPool(
        spec.function, processes=rewards.processes, deadline_s=spec.deadline_s, log=plan.paths.logs / f"{name}.reward.log"
    )
    worker = RewardWorker(
        _client(name, plan, peers),
        pool,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        name=name,
        lease_size=rewards.lease_size,
        poll_s=plan.deployment.limits.poll_s,
    )
    return worker, None


def _learner(name: str, plan: Plan, peers: Peers) -> Built:
    raise NotImplementedError


def _sampling(plan: Plan, temperature: float | None = None) -> Sampling:
    spec = plan.recipe.sampling
    held_out = temperature is not None
    return Sampling(
        temperature=temperature if temperature is not None else spec.temperature,
        top_p=1.0 if held_out else spec.top_p,
        top_k=0 if held_out else spec.top_k,
        max_tokens=spec.max_response_length,
        stop_token_ids=plan.stop_token_ids,
    )


__all__ = ["build", "build_store", "load_callable", "prepare_prompts", "run_id", "sweep"]
