"""What scores in `asyncrl eval`: functions in killable processes, and before them the reward models and judges of the recipe: a
run's own served in this process, frozen, as its actors serve them; APIs asked where they are."""

import argparse
import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec.structs import replace

from asyncrl.cluster.serving import provenance, require_scored_alone, serve_model, tell_changes
from asyncrl.config import QUESTIONS, Deployment, RewardSpec, RewardTerm
from asyncrl.config.callables import check_callable
from asyncrl.errors import ConfigError
from asyncrl.learn.policies import Policy
from asyncrl.reward.asking import AskFirst, Send, behind_models
from asyncrl.reward.opinions import Chat, api_key, read_prompt
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Opinion
from asyncrl.reward.served import Respond
from asyncrl.rundir import RunDir
from asyncrl.scratch import ScratchFolder

_REACH_S = 10.0  # to connect to a judge's API
Pool = RewardPool[int] | AskFirst[int]


def reward_of(args: argparse.Namespace, policy: Policy) -> RewardSpec:
    """What the command names, or the run's. Raises ConfigError for what is known to fail before anything is loaded."""
    if args.reward is not None:
        spec = RewardSpec(function=f"{args.reward}:compute_score" if args.reward.endswith(".py") else args.reward)
    elif policy.recipe is None:
        raise ConfigError(f"{args.model} is no run with a recipe, so nothing says how to score; add --reward file.py:name")
    else:
        spec = policy.recipe.reward
    require_scored_alone(spec)
    for term in spec.terms():
        if term.function:
            check_callable(term.function, "--reward")
        elif judge := term.judge:
            read_prompt(judge)
            api_key(judge)
            if judge.url:
                _require_reachable(judge.url)
            if judge.pairwise:
                print(f"{term.named} is not asked: it would compare this policy with itself", file=sys.stderr)
    return spec if args.reward_deadline is None else replace(spec, deadline_s=args.reward_deadline)


def _require_reachable(url: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or url, port), _REACH_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward.judge.url={url!r} can't be reached from here ({error}), so nobody would judge; start it, or score by "
            "--reward file.py:name"
        ) from error


@contextlib.contextmanager
def scoring(spec: RewardSpec, deployment: Deployment, processes: int, known: Path) -> Iterator[tuple[Pool, dict[str, Any]]]:
    """What scores samples, until the end of the block, and what the models and judges are, by the names of their terms. Waits
    until all is loaded. Warns of one that is not what the run in the folder `known` was rewarded by. Raises ConfigError."""
    told: dict[str, Any] = {}
    terms = spec.terms()
    with contextlib.ExitStack() as ending:
        logs = ending.enter_context(contextlib.closing(ScratchFolder())).path
        threads = ending.enter_context(ThreadPoolExecutor(QUESTIONS))

        def tell(term: RewardTerm, facts: dict[str, str]) -> None:
            told[term.named] = provenance(term, facts)
            tell_changes(RunDir(known).rewards, term, told[term.named])

        def served(term: RewardTerm) -> Send:
            models, name = deployment.rewards.models, f"eval-model-{len(told)}"
            server = serve_model(name, term, models, deployment.limits, logs, spec.deadline_s)
            ending.callback(server.close)
            tell(term, server.facts)
            return _in_threads(server.respond, threads)

        pool: RewardPool[Any] = RewardPool(
            terms, processes=processes, deadline_s=spec.deadline_s, memory_bytes=spec.memory_bytes
        )
        if all(term.function for term in terms):
            yield ending.enter_context(pool), told
            return
        for term in terms:
            if term.judge and term.judge.url:
                tell(term, {})
        yield ending.enter_context(behind_models(pool, spec, served)), told


def _in_threads(respond: Respond, threads: ThreadPoolExecutor) -> Send:
    async def send(chat: Chat) -> Opinion:
        return await asyncio.get_running_loop().run_in_executor(threads, respond, chat)

    return send
