"""Python functions as tools, by TRL's convention: typed functions with a Google-style docstring, of which the model sees the
schema; or the public methods of an environment's class, each episode with an object of its own."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from asyncrl.episodes.environments import Message, Step, Task
from asyncrl.errors import ConfigError

Function = Callable[..., Any]
_SCHEMAS: dict[Function, dict[str, Any]] = {}


class Tools:
    """An environment in which the policy calls functions until it answers without a call. Calls of one turn run side by side.

    owner: an object as TRL's `environment_factory` makes it: `reset(**columns)` may return a text, which is added to the last
    message of the prompt; its other public methods are tools; what `get_reward()` says, if there is one, is the episode's
    reward so far. Figures: `tool_calls`, and of them `tool_failures`: what the policy called wrongly, or what raised, which the
    policy reads as an error.
    """

    def __init__(self, functions: Sequence[Function], owner: Any = None) -> None:
        own: list[tuple[str, Function]] = inspect.getmembers(owner, inspect.ismethod) if owner is not None else []
        methods = [method for name, method in own if not name.startswith("_") and name not in ("reset", "get_reward")]
        self._functions = {function.__name__: function for function in (*functions, *methods)}
        self.tools = [schema(function) for function in self._functions.values()]
        self._owner = owner
        self._earned = 0.0

    async def reset(self, task: Task) -> Sequence[Message]:
        messages: list[Message] = task.row["prompt"]
        shown = await resolved(self._owner.reset(**task.row)) if self._owner is not None else None
        if shown is None:
            return messages
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + shown}]

    async def step(self, reply: Message) -> Step:
        calls = reply.get("tool_calls", ())
        results = await asyncio.gather(*(self._call(call) for call in calls), return_exceptions=True)
        before, self._earned = self._earned, await self._reward()
        return Step(
            messages=tuple(_shown(call, result) for call, result in zip(calls, results, strict=True)),
            reward=self._earned - before,
            done=not calls,
            parts={
                "tool_calls": float(len(calls)),
                "tool_failures": float(sum(isinstance(result, BaseException) for result in results)),
            },
        )

    async def _call(self, call: Message) -> Any:
        named = call["function"]
        if not isinstance(named["arguments"], dict):
            raise ValueError(f"the call can't be read: {named['arguments']!r}; write a tool's name and all of its arguments")
        if named["name"] not in self._functions:
            raise ValueError(f"there is no tool {named['name']!r}; there are {', '.join(self._functions)}")
        function = self._functions[named["name"]]
        if inspect.iscoroutinefunction(function):
            return await function(**named["arguments"])
        return await asyncio.to_thread(function, **named["arguments"])

    async def _reward(self) -> float:
        get = getattr(self._owner, "get_reward", None)
        return float(await resolved(get())) if get is not None else 0.0


def prepare_tools(make: Function | None, functions: Sequence[Function]) -> None:
    """Does once, before there are episodes, what each of them would: imports, and schemas. Raises ConfigError."""
    if inspect.isclass(make) and not hasattr(make, "step"):  # its methods will be tools
        import transformers.utils  # noqa: F401
    for function in functions:
        schema(function)


def schema(function: Function) -> dict[str, Any]:
    """A function as a model is told of it. Raises ConfigError for one without types, or without a docstring."""
    known = getattr(function, "__func__", function)  # of a method what all objects share
    if known not in _SCHEMAS:
        _SCHEMAS[known] = _schema(function)
    return _SCHEMAS[known]


def _schema(function: Function) -> dict[str, Any]:
    from transformers.utils import get_json_schema  # it imports for a second

    try:
        told: dict[str, Any] = get_json_schema(function)
    except Exception as error:
        raise ConfigError(
            f"episode.tools: {function.__name__} can't be described to a model: {error} Give its parameters types, and a "
            "docstring that has them under `Args:`"
        ) from error
    told["function"].pop("return", None)  # as in TRL: templates have no place for it
    return told


def _shown(call: Message, result: Any) -> Message:
    text = f"error: {type(result).__name__}: {result}" if isinstance(result, BaseException) else str(result)
    return {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": text}


async def resolved(value: Any) -> Any:
    """A result, also of an `async def`."""
    return await value if isinstance(value, Awaitable) else value
