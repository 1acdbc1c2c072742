"""Environments written for other frameworks, as they are: SkyRL-Gym's, gymnasium's, TRL's.

`episode.environment` names what makes one: a class of theirs, or `skyrl_gym:make`, `gymnasium:make`. Those of verifiers ask
the policy themselves: agents.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

from asyncrl.episodes.environments import Environment, Message, Step, Task
from asyncrl.episodes.tools import Function, Tools
from asyncrl.errors import ConfigError

Make = Callable[..., Any]


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
