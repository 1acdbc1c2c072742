"""Environments written for other frameworks, as they are: SkyRL-Gym's, gymnasium's, TRL's, verifiers'.

`episode.environment` names what makes one: a class of theirs, or `skyrl_gym:make`, `gymnasium:make`. Those of verifiers ask
the policy themselves, as agents do: `episode.agent` is `verifiers:load_environment` (to 0.3.1), or
`verifiers.v1:load_environment`.
"""

import contextlib
import os
import ssl
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from asyncrl.config.callables import describe
from asyncrl.episodes.environments import Environment, Message, Step, Task
from asyncrl.episodes.tools import Function, Tools
from asyncrl.errors import ConfigError

Make = Callable[..., Any]
KEY = "OPENAI_API_KEY"  # the environment variable of an agent's key


class SkyRLGym:
    """`init(prompt)`, `step(action) -> {observations, reward, done, …}`, `close()` (skyrl-gym 0.4). A row's columns are its
    `extras`, as in SkyRL."""

    def __init__(self, make: Make, arguments: dict[str, Any]) -> None:
        self._make = lambda extras: make(**arguments, extras=extras)

    def reset(self, task: Task) -> Sequence[Message]:
        self._env = self._make(task.row)
        messages: Sequence[Message] = self._env.init(task.row["prompt"])[0]
        return messages

    def step(self, reply: Message) -> Step:
        told = self._env.step(reply["content"])
        return Step(messages=tuple(told["observations"]), reward=float(told["reward"]), done=bool(told["done"]))

    def close(self) -> None:
        self._env.close()


class Gymnasium:
    """`reset(seed=…)`, `step(action)`, `close()` (gymnasium 1). What it shows follows the row's prompt, as text; the answer is
    the action, of a discrete space its number. An answer that is none costs a turn."""

    def __init__(self, make: Make, arguments: dict[str, Any]) -> None:
        self._env = make(**arguments)

    def reset(self, task: Task) -> Sequence[Message]:
        seen, _ = self._env.reset(seed=task.seed & 0x7FFFFFFF)
        *before, last = task.row["prompt"]
        return [*before, {**last, "content": f"{last['content']}\n{seen}"}]

    def step(self, reply: Message) -> Step:
        action: Any = reply["content"]
        if hasattr(self._env.action_space, "n"):  # a discrete one
            action = int(action) if action.strip().isdecimal() else None
        if action is None or not self._env.action_space.contains(action):
            return self._answer(f"no action: {reply['content']!r} is not in {self._env.action_space}")
        seen, reward, terminated, truncated, _ = self._env.step(action)
        return self._answer(str(seen), float(reward), bool(terminated or truncated))

    def close(self) -> None:
        self._env.close()

    @staticmethod
    def _answer(text: str, reward: float = 0.0, done: bool = False) -> Step:
        return Step(messages=({"role": "user", "content": text},), reward=reward, done=done)


ADAPTERS: dict[str, Callable[[Make, dict[str, Any]], Environment]] = {"skyrl_gym": SkyRLGym, "gymnasium": Gymnasium}


def environment_of(make: Make | None, arguments: dict[str, Any], tools: Sequence[Function] = ()) -> Environment:
    """A new environment. Whose kind it is tells the package of what makes it, or of a class that it derives from; one that has
    `reset` and no `step` is TRL's. None: there are only tools."""
    if make is None:
        return Tools(tools)
    modules = [kind.__module__ for kind in getattr(make, "__mro__", ())] or [getattr(make, "__module__", "")]
    packages = {module.partition(".")[0] for module in modules}
    for package, adapter in ADAPTERS.items():
        if package in packages:
            return adapter(make, arguments)
    environment: Environment = make(**arguments)
    if not hasattr(environment, "step"):
        return Tools(tools, environment)
    if tools:
        raise ConfigError(
            "episode.tools with an episode.environment that has a step of its own: nobody would call them; leave one out"
        )
    return environment


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
