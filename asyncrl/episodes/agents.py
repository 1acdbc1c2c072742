"""What makes agents, which ask the policy through the gateway: functions, and the environments of verifiers, as they are.

`episode.agent` names the function, or `verifiers:load_environment` (to 0.3.1), or `verifiers.v1:load_environment`.
"""

import contextlib
import os
import ssl
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from asyncrl.config.callables import describe
from asyncrl.episodes.adapters import Make
from asyncrl.episodes.environments import Task
from asyncrl.errors import ConfigError

KEY = "OPENAI_API_KEY"  # the environment variable of an agent's key


class Verifiers:
    """`load_environment`, or a class of an environment (verifiers to 0.3.1). A row is one of its dataset's."""

    def __init__(self, make: Make, arguments: dict[str, Any]) -> None:
        self._environment = make(**arguments)

    async def __call__(self, task: Task, *, base_url: str, model: str) -> dict[str, float]:
        from verifiers.clients import resolve_client
        from verifiers.types import ClientConfig

        client = resolve_client(ClientConfig(api_base_url=base_url, api_key_var=KEY))
        try:
            told = await self._environment.run_rollout({"example_id": task.group, **task.row}, client, model, {})
        finally:
            await client.close()
        if told.get("error"):
            raise RuntimeError(f"verifiers: {told['error']}")
        return {**told["metrics"], "score": told["reward"]}


class VerifiersV1:
    """`verifiers.v1:load_environment` (verifiers 0.4). Arguments are what its command line takes behind `--env.`, such as
    `taskset.id`; a row is a task's data. What it serves to its agents lives as long as an episode."""

    def __init__(self, make: Make, arguments: dict[str, Any]) -> None:
        import verifiers.v1 as vf

        nested: dict[str, Any] = {}
        for name, value in arguments.items():
            *path, last = name.split(".")
            place = nested
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        self._environment = make(vf.resolve_env_config(nested))

    async def __call__(self, task: Task, *, base_url: str, model: str) -> dict[str, float]:
        import verifiers.v1 as vf

        kind = type(self._environment.taskset).task_type()
        asked = kind(kind.data_type().model_validate(task.row), self._environment.config.taskset.task)
        client = vf.EvalClientConfig(base_url=base_url, api_key_var=KEY)
        async with self._environment.serving():
            context = vf.ModelContext(model=model, client=client, sampling=vf.SamplingConfig())
            episode = await self._environment.run_episode(asked, context)
        errors = [error for source in (episode, *episode.traces) for error in source.errors]
        if not episode.ok:
            raise RuntimeError(f"verifiers: {errors[-1].type}: {errors[-1].message}" if errors else "verifiers: not ok")
        if len(episode.traces) != 1:
            raise RuntimeError(f"verifiers: {len(episode.traces)} agents took part; only the policy's reward can be trained")
        (trace,) = episode.traces
        parts = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return {**metrics, **parts, "score": trace.reward}


def agent_of(make: Make, arguments: dict[str, Any]) -> Callable[..., Any]:
    """The agent that is called with each task. One of verifiers is made once, before there are episodes: it loads data.
    Raises ConfigError if that fails."""
    _prepare_clients()
    package, _, module = getattr(make, "__module__", "").partition(".")
    if package != "verifiers":
        return partial(make, **arguments)
    try:
        return (VerifiersV1 if module.startswith("v1") else Verifiers)(make, arguments)
    except Exception as error:
        named = f"{make.__qualname__} with episode.arguments={arguments}"
        raise ConfigError(f"episode.agent: {named} can't be made: {describe(error)}") from error


def _prepare_clients() -> None:
    """What each agent's HTTP client costs, or needs, again and again."""
    if "openai" in sys.modules:
        for module in ("openai.resources.chat", "httpcore", "anyio._backends._asyncio"):
            with contextlib.suppress(ImportError):
                import_module(module)  # which each process would do at its first call, for 0.2 s
    known = ssl.get_default_verify_paths().capath
    if known and "SSL_CERT_FILE" not in os.environ and any(Path(known).glob("*.0")):
        os.environ["SSL_CERT_DIR"] = known  # httpx would read a file of all certificates for each client, in 20 ms
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    os.environ |= {"no_proxy": direct, "NO_PROXY": direct}  # the gateway is no proxy's
