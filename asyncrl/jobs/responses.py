"""What `asyncrl eval` has an engine of this process generate: single answers, or episodes as a run's generator has them."""

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from asyncrl.config import Deployment, EpisodeSpec, GeneratorsSpec, LimitsSpec
from asyncrl.generate.engines import EngineSite, engine_kind
from asyncrl.generate.workload import SingleAnswers
from asyncrl.interfaces import Engine
from asyncrl.learn.policies import Policy, load
from asyncrl.replay.plan import Evaluation
from asyncrl.scratch import ScratchFolder
from asyncrl.types import Generation, Ticket, Version, derive_seed

if TYPE_CHECKING:
    from asyncrl.episodes.host import EpisodeHost


def tickets(held_out: Evaluation, seed: int) -> list[Ticket]:
    """One for each prompt and setting, numbered by their positions."""
    found = []
    for position in range(held_out.total):
        setting, prompt = held_out.at(position)
        ticket = Ticket(
            group=position,
            attempt=0,
            prompt=prompt,
            rollouts=tuple(range(setting.n)),
            seeds=tuple(derive_seed(seed, prompt.row, rollout) for rollout in range(setting.n)),
            sampling=setting.sampling,
            purpose="eval",
        )
        found.append(ticket)
    return found


def generated(
    policy: Policy, episode: EpisodeSpec, deployment: Deployment, asked: Sequence[Ticket], records: Mapping[int, str], seed: int
) -> list[Generation]:
    """What one generator of the deployment, as wide as this needs it, makes of the tickets, in their order. records: dataset
    rows as JSON, by the prompts' rows."""
    limits, sampling = deployment.limits, asked[0].sampling
    rollouts, prompts = sum(len(ticket.rollouts) for ticket in asked), len({ticket.prompt.row for ticket in asked})
    longest = max(len(ticket.prompt.ids) for ticket in asked) + sampling.max_tokens
    engine = deployment.generators.engine
    engine = replace(engine, slots=min(engine.slots, rollouts), max_length=engine.max_length if episode.what else longest)
    generators = replace(deployment.generators, count=1, engine=engine)
    how = f"a turn with {episode.what}, {engine.max_length} in all" if episode.what else "each"
    how += f", by the {engine.kind} engine on {'cuda' if generators.place.gpus else 'cpu'}"
    print(f"{prompts} prompts × {rollouts // prompts}, at most {sampling.max_tokens} tokens {how}", file=sys.stderr)
    with _engine(policy, generators, limits) as running:
        if not episode.what:
            return _answer(running, asked, limits.health_timeout_s)
        from asyncrl.episodes.build import episode_host
        from asyncrl.episodes.host import MOST
        from asyncrl.models.tokenizing import load_tokenizer

        host = episode_host(
            running,
            episode,
            load_tokenizer(policy.spec),
            sampling.stop_token_ids,
            turn_tokens=sampling.max_tokens,
            record=lambda row, purpose: records[row],
            seed=seed,
            start_timeout_s=limits.start_timeout_s,
        )
        with contextlib.closing(host):
            at_once = episode.in_flight or MOST * engine.slots  # some wait for their environments
            return _play(running, host, asked, at_once, limits.health_timeout_s)


def _answer(engine: Engine, asked: Sequence[Ticket], health_timeout_s: float) -> list[Generation]:
    """The answers to the tickets' rollouts, in order. Raises what ended the engine, and Unavailable if it makes no progress.

    The same seeds give the same answers of an engine in this process: all requests are there before its first step, so that the
    batches, and with them the rounding, repeat.
    """
    engine.pause()
    futures = [future for ticket in asked for future in SingleAnswers(engine).submit(ticket)]
    engine.resume()
    return _ended(engine, futures, health_timeout_s)


def _play(
    engine: Engine, host: "EpisodeHost", asked: Sequence[Ticket], at_once: int, health_timeout_s: float
) -> list[Generation]:
    """The same for episodes, so many at a time. Which of them meet in a batch depends on the environments, and with it the
    rounding."""
    free, futures = threading.Semaphore(at_once), list[Future[Generation]]()
    for ticket in asked:
        for rollout, seed in zip(ticket.rollouts, ticket.seeds, strict=True):
            while not free.acquire(timeout=health_timeout_s):
                engine.health(health_timeout_s)
            futures += host.submit(replace(ticket, rollouts=(rollout,), seeds=(seed,)))
            futures[-1].add_done_callback(lambda _: free.release())
    return _ended(engine, futures, health_timeout_s)


def _ended(engine: Engine, futures: "Sequence[Future[Generation]]", health_timeout_s: float) -> list[Generation]:
    while wait(futures, timeout=health_timeout_s).not_done:
        engine.health(health_timeout_s)
    return [future.result() for future in futures]


@contextlib.contextmanager
def _engine(policy: Policy, generators: GeneratorsSpec, limits: LimitsSpec) -> Iterator[Engine]:
    """An engine as a generator of a run has one: started, and given the policy's weights."""
    from asyncrl.models.loading import export, named_weights

    with contextlib.closing(ScratchFolder()) as scratch:
        spec = policy.spec
        model, tokenizer = load(policy)
        if policy.checkpoint is not None and not spec.builder:  # an engine loads Hugging Face folders only
            dtype = str(model.dtype).removeprefix("torch.")
            spec = replace(spec, path=f"{scratch.path}/model", dtype=dtype)
            export(model, tokenizer, Path(spec.path))
        if (served := generators.engine.dtype) != "auto":
            spec = replace(spec, dtype=served)
        site = EngineSite(generators=generators, model=spec, limits=limits, name="eval", logs=scratch.path)
        engine = engine_kind(generators.engine.kind).build(site)
        try:
            engine.start()
            engine.update_weights(Version(0, 0), named_weights(model))
            del model  # the engine has its own
            yield engine
        finally:
            engine.close()
