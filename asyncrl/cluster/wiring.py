"""From specs to stages. The one place that knows every stage's constructor; each function runs inside its actor."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from msgspec.structs import replace

from asyncrl.cluster.fit import DeviceMemory, agree, device_memory, fit_layouts
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.transport import Peers, RayBus, RayCall, RayModel, ask_ranks
from asyncrl.config import Group, Layout, RewardTerm, run_dtypes
from asyncrl.config.callables import load_callable
from asyncrl.interfaces import Engine, Stage
from asyncrl.types import Sampling, Ticket, derive_seed

if TYPE_CHECKING:
    from asyncrl.episodes.host import EpisodeHost
    from asyncrl.learn.parallel.rank import Rank
    from asyncrl.replay.client import ReplayClient
    from asyncrl.replay.store import ReplayStore
    from asyncrl.reward.asking import AskFirst
    from asyncrl.reward.pool import RewardPool

log = logging.getLogger(__name__)
FIRST_TOKENS = 32  # of the answer that a run is checked by, at the most


class Built(NamedTuple):
    """A stage, and what to close when it has ended."""

    stage: Stage
    closers: tuple[Callable[[], None], ...]


# -------------------------------------------------------------------------------------------------------- the store


def build_store(plan: RunPlan) -> "ReplayStore":
    """Opens the log of the run directory, or rebuilds the store from it."""
    from asyncrl.prompts.dataset import PromptFile
    from asyncrl.replay.plan import GROUP_FILTERS, EvalSetting, Evaluation, Source, StorePlan
    from asyncrl.replay.store import ReplayStore

    recipe, sampling, held_out = plan.recipe, plan.recipe.sampling, plan.recipe.evaluation
    engine = plan.deployment.generators.engine
    source = Source(
        prompts=PromptFile(plan.paths.data / "train.arrow"),
        sampling=_sampling(plan, sampling.temperature, sampling.top_p, sampling.top_k),
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        epochs=recipe.data.epochs,
    )
    evaluation = Evaluation()
    if held_out.files:
        evaluation = Evaluation(
            prompts=PromptFile(plan.paths.data / "eval.arrow")[: held_out.limit],
            settings=(
                EvalSetting("", _sampling(plan, held_out.temperature), held_out.n),
                *(EvalSetting(a.name, _sampling(plan, a.temperature, a.top_p, a.top_k), a.n) for a in held_out.also),
            ),
            metrics=tuple(load_callable(metric, "evaluation.metrics") for metric in held_out.metrics),
            pinned=not recipe.episode.what,
        )
    store_plan = StorePlan(
        rule=plan.staleness,
        source=source,
        sampling=sampling,
        keep=GROUP_FILTERS.get(sampling.keep) or load_callable(sampling.keep, "sampling.keep"),
        baseline=recipe.algorithm.wants_baseline,
        evaluation=evaluation,
        lease_s=plan.deployment.limits.lease_s,
        reward=(f"episode {recipe.episode.what} with " if recipe.episode.what else "")
        + f"reward {', '.join(term.what for term in recipe.reward.terms())}",
        stream_interval=0 if recipe.episode.what or not engine.hands_over else engine.stream_interval,
        whole_groups=recipe.reward.pairwise,
    )
    return ReplayStore(store_plan, plan.paths.replay, plan.deployment.store)


# ------------------------------------------------------------------------------------------------------- the stages


def build(role: str, name: str, restart_count: int, plan: RunPlan, peers: Peers, followers: Sequence[Any] = ()) -> Built:
    """Builds a stage of `role` in the calling process. restart_count: rises with every restart of this actor. followers: the
    actors of a learner's other ranks."""
    if role == "rank":
        return _follower(name, plan)
    if role == "model":
        return _model(name, plan)
    from asyncrl.replay.client import ReplayClient

    incarnation = plan.incarnation(restart_count)
    store = ReplayClient(RayCall(peers), name, incarnation, run=plan.paths.run_id, retry_s=_patience_s(plan))
    if role == "reward":
        return _reward(name, plan, peers, store)
    return _generator(name, incarnation, plan, peers, store) if role == "generator" else _learner(plan, store, followers)


def _patience_s(plan: RunPlan) -> float:
    """How long a peer may be gone: it is found to hang, and another one starts."""
    return plan.deployment.limits.health_timeout_s + plan.deployment.limits.start_timeout_s


def _host(plan: RunPlan) -> str:
    """Where this node's sockets listen."""
    return "127.0.0.1" if plan.loopback else ray.util.get_node_ip_address()


def _generator(name: str, incarnation: int, plan: RunPlan, peers: Peers, store: "ReplayClient") -> Built:
    from asyncrl.generate.engines import EngineSite, engine_kind
    from asyncrl.generate.generator import Generator
    from asyncrl.models.loading import use_threads
    from asyncrl.models.tokenizing import load_tokenizer
    from asyncrl.weights.relay import WeightRelay
    from asyncrl.weights.subscriber import WeightSubscriber

    recipe, bus, limits, generators = plan.recipe, plan.deployment.bus, plan.deployment.limits, plan.deployment.generators
    use_threads(generators.place.threads)
    site = EngineSite(
        generators=generators,
        model=replace(recipe.model, dtype=run_dtypes(recipe, plan.deployment).engine),
        limits=limits,
        name=name,
        logs=plan.paths.logs,
        host=_host(plan),
    )
    engine = engine_kind(generators.engine.kind).build(site)
    weights = WeightSubscriber(
        RayBus(peers, name, incarnation),
        name=name,
        transport=bus.transport,
        credit=bus.credit,
        deadline_s=_patience_s(plan),
        codec=bus.codec,
        relay=WeightRelay(_host(plan), shares_memory=bus.transport == "auto") if bus.fanout else None,
    )
    tokenizer = load_tokenizer(recipe.model)
    episodes = _episodes(name, plan, engine, tokenizer)
    generator = Generator(
        engine,
        store,
        weights,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        name=name,
        group_size=recipe.rollouts_per_group,
        limits=limits,
        episodes=episodes,
    )
    engine.start()
    return Built(generator, (store.close, weights.close, *([episodes.close] if episodes else []), engine.close))


def first_ticket(plan: RunPlan, place: int) -> Ticket:
    """For a short answer to the prompt at a place among the run's, sampled as the run does."""
    from asyncrl.prompts.dataset import PromptFile

    recipe, prompts = plan.recipe, PromptFile(plan.paths.data / "train.arrow")
    sampling = _sampling(plan, recipe.sampling.temperature, recipe.sampling.top_p, recipe.sampling.top_k)
    return Ticket(
        group=-1,
        attempt=0,
        prompt=prompts[place % len(prompts)],
        rollouts=(0,),
        seeds=(derive_seed(recipe.seed, 1),),
        sampling=replace(sampling, max_tokens=min(FIRST_TOKENS, sampling.max_tokens)),
    )


def _episodes(name: str, plan: RunPlan, engine: Engine, tokenizer: Any) -> "EpisodeHost | None":
    """What runs episodes with the engine, if the recipe has them."""
    recipe, spec, limits = plan.recipe, plan.recipe.episode, plan.deployment.limits
    if not spec.what:
        return None
    from asyncrl.episodes.build import episode_host
    from asyncrl.prompts.dataset import PromptFile

    prompts = {purpose: PromptFile(plan.paths.data / f"{purpose}.arrow") for purpose in _purposes(plan)}
    return episode_host(
        engine,
        spec,
        tokenizer,
        plan.stop_token_ids,
        turn_tokens=recipe.sampling.max_response_length,
        record=lambda row, purpose: prompts[purpose].record(row),
        seed=recipe.seed,
        log=plan.paths.logs / f"{name}.episodes.log",
        start_timeout_s=limits.start_timeout_s,
    )


def _purposes(plan: RunPlan) -> tuple[str, ...]:
    """What there are prompts for."""
    return ("train", "eval") if plan.recipe.evaluation.files else ("train",)


def _reward(name: str, plan: RunPlan, peers: Peers, store: "ReplayClient") -> Built:
    from asyncrl.prompts.dataset import PromptFile
    from asyncrl.reward.pool import RewardPool
    from asyncrl.reward.shaping import shape
    from asyncrl.reward.worker import RewardWorker

    recipe, spec, rewards = plan.recipe, plan.recipe.reward, plan.deployment.rewards
    prompts = {purpose: PromptFile(plan.paths.data / f"{purpose}.arrow") for purpose in _purposes(plan)}
    pool: RewardPool[Any] = RewardPool(
        spec.terms(),
        processes=rewards.processes,
        deadline_s=spec.deadline_s,
        start_timeout_s=plan.deployment.limits.start_timeout_s,
        log=plan.paths.logs / f"{name}.reward.log",
        memory_bytes=spec.memory_bytes,
    )
    worker = RewardWorker(
        store,
        _behind_models(name, plan, peers, pool),
        name=name,
        record=lambda item: prompts[item.purpose].record(item.prompt.row),
        shape=lambda reward, ids: shape(reward, ids, spec.shaping, recipe.sampling.max_response_length),
        lease_size=rewards.lease_size,
        poll_s=plan.deployment.limits.poll_s,
    )
    return Built(worker, (store.close,))


def _behind_models(name: str, plan: RunPlan, peers: Peers, pool: "RewardPool[Any]") -> "RewardPool[Any] | AskFirst[Any]":
    """The pool alone, where nothing but functions scores."""
    spec = plan.recipe.reward
    if all(term.function for term in spec.terms()):
        return pool
    from asyncrl.cluster.serving import note
    from asyncrl.reward.asking import behind_models

    for term in spec.terms():
        if term.judge and term.judge.url and name == "reward-0":
            note(plan.paths.rewards, term, {})

    def served(term: RewardTerm) -> RayModel:
        actors = [actor for actor, of in plan.models.items() if of == term]
        return RayModel(peers, actors, spec.deadline_s, _patience_s(plan))

    return behind_models(pool, spec, served)


def _model(name: str, plan: RunPlan) -> Built:
    from asyncrl.cluster.serving import note, serve_model
    from asyncrl.reward.served import ServedModel

    term, deployment = plan.models[name], plan.deployment
    deadline_s = plan.recipe.reward.deadline_s
    served = serve_model(name, term, deployment.rewards.models, deployment.limits, plan.paths.logs, deadline_s)
    note(plan.paths.rewards, term, served.facts)
    return Built(ServedModel(name, served.respond, served.health), (served.close,))


def _learner(plan: RunPlan, store: "ReplayClient", followers: Sequence[Any]) -> Built:
    from asyncrl.learn.learner import Learner
    from asyncrl.learn.parallel.gang import Gang
    from asyncrl.models.ranks import open_rendezvous
    from asyncrl.weights.publisher import WeightPublisher

    recipe, bus, host = plan.recipe, plan.deployment.bus, _host(plan)
    if followers:
        ask, rendezvous = partial(ask_ranks, followers), open_rendezvous(host)
        built = ask("build", host, rendezvous.port)
        rank = _rank(plan, "learner", rendezvous)
        ranks: Rank | Gang = Gang(rank, ask)
        built()
    else:
        ranks = rank = _rank(plan, "learner")

    def open_bus(incarnation: int) -> WeightPublisher:
        return WeightPublisher(
            incarnation,
            host=host,
            transport=bus.transport,
            bucket_bytes=bus.bucket_bytes,
            codec=bus.codec,
            anchor_freq=bus.anchor_freq,
            fanout=bus.fanout,
        )

    learner = Learner(
        ranks,
        store,
        open_bus,
        rank.checkpoints,
        save_freq=recipe.checkpoint.save_freq,
        eval_freq=recipe.evaluation.freq if recipe.evaluation.files else None,
        poll_s=plan.deployment.limits.poll_s,
    )
    learner.start(plan.resume_at)
    return Built(learner, (store.close, learner.close))


def _follower(name: str, plan: RunPlan) -> Built:
    from asyncrl.learn.parallel.gang import Follower
    from asyncrl.models.ranks import reach_rendezvous

    timeout_s = plan.deployment.limits.start_timeout_s
    follower = Follower(name, lambda host, port: _rank(plan, name, reach_rendezvous(host, port, timeout_s)))
    return Built(follower, ())


def _rank(plan: RunPlan, name: str, rendezvous: Any = None) -> "Rank":
    """What this process trains: all, or the part of rank `name` in the group that meets at the rendezvous. Waits there for the
    others."""
    from asyncrl.learn.build import policy_trainer
    from asyncrl.learn.checkpoint import Checkpoints
    from asyncrl.learn.parallel.rank import Rank
    from asyncrl.models.loading import use_threads
    from asyncrl.models.ranks import Ranks, join, talk_over
    from asyncrl.models.tokenizing import load_tokenizer

    recipe, deployment, limits = plan.recipe, plan.deployment, plan.deployment.limits
    names = deployment.ranks
    place = deployment.groups[names[name]].place
    device = "cuda" if place.gpus else "cpu"
    use_threads(place.threads)
    found = device_memory(place)
    if rendezvous is None:
        ranks = Ranks(_fit(plan, {"learner": [found]}))
    else:
        talk_over(_host(plan))
        index, layouts = agree(rendezvous, list(names).index(name), list(names.values()), found, partial(_fit, plan))
        # Who waits longer than this is not heard any more: the watch over stalled runs goes first.
        timeout_s = 2 * max(limits.stall_timeout_s, limits.save_timeout_s)
        ranks = join(rendezvous, index, layouts, device=device, timeout_s=timeout_s)
    trainer = policy_trainer(recipe, device=device, refused_dir=plan.paths.logs / "refused", ranks=ranks)
    checkpoints = Checkpoints(plan.paths, recipe.checkpoint.keep_last_n, recipe.checkpoint.keep_every, ranks)
    return Rank(trainer, checkpoints, load_tokenizer(recipe.model), ranks, run_dtypes(recipe, deployment).bus)


def _fit(plan: RunPlan, devices: Mapping[Group, Sequence[DeviceMemory]]) -> dict[Group, Layout]:
    """How ranks with these devices divide the learner's models, as `--dry-run` tells it."""
    fits = fit_layouts(plan.recipe, plan.deployment, devices)
    for group, fit in fits.items():
        log.info("\n  ".join([f"{group}: {fit.reason}", *fit.table]))
    return {group: fit.layout for group, fit in fits.items()}


def _sampling(plan: RunPlan, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Sampling:
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=plan.recipe.sampling.max_response_length,
        stop_token_ids=plan.stop_token_ids,
    )
