"""The processes that run users' environments: `python -m asyncrl.episodes.child EPISODE …`, EpisodeSpec as JSON; see
`asyncrl.forks`. Each fork runs one episode after the other.

    host ── Task | Reply | Engage ──► fork      a Task or an Engage begins the next episode
    host ◄── Begun | Stepped | AgentEnded | Failed ── fork

No numpy, no torch: it must start quickly.
"""

import asyncio
import inspect
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from io import BufferedRWPair
from typing import Any

import msgspec
from msgspec import Struct

from asyncrl.config import EpisodeSpec
from asyncrl.config.callables import describe, load_callable, named_parameters
from asyncrl.episodes.adapters import environment_of
from asyncrl.episodes.agents import KEY, agent_of
from asyncrl.episodes.environments import Message, Step, Task
from asyncrl.episodes.tools import prepare_tools, resolved
from asyncrl.forks import Broken, Died, Loaded, fork_for
from asyncrl.processes import framed, read_frame

MODEL = "policy"  # what agents call it


class Reply(Struct, frozen=True, tag="reply"):
    message: Message


class Engage(Struct, frozen=True, tag="engage"):
    """Begins an agent's episode: where it reaches the policy."""

    task: Task
    base_url: str
    api_key: str


class Close(Struct, frozen=True, tag="close"):
    """The episode has ended. Nothing answers this."""


class AgentEnded(Struct, frozen=True, tag="ended"):
    """What an agent returned: what it earned, if it says so."""

    reward: float | None
    parts: dict[str, float]


class Begun(Struct, frozen=True, tag="begun"):
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Stepped(Struct, frozen=True, tag="stepped"):
    step: Step


class Failed(Struct, frozen=True, tag="failed"):
    error: str


Told = Loaded | Broken | Died | Begun | Stepped | AgentEnded | Failed
decode_told = msgspec.msgpack.Decoder(Told).decode
_decode_asked = msgspec.msgpack.Decoder(Task | Reply | Engage | Close).decode


def load_episodes(episode: str) -> Callable[[socket.socket], None]:
    """What runs episodes in a fork. Raises ConfigError if the user's code can't be loaded."""
    spec = msgspec.json.decode(episode, type=EpisodeSpec)
    named = spec.environment or spec.agent
    make = load_callable(named, "episode.environment" if spec.environment else "episode.agent") if named else None
    tools = [load_callable(tool, "episode.tools") for tool in spec.tools]
    if spec.agent and make is not None:
        new = agent_of(make, spec.arguments)
    else:
        prepare_tools(make, tools)
        new = partial(environment_of, make, spec.arguments, tools)
    return partial(run_episodes, new, getattr(make, "__module__", ""))


def run_episodes(new: Callable[..., Any], module: str, peer: socket.socket) -> None:
    """One episode after the other until the host closes its end, or one fails. new: makes an environment, or is the agent.
    module: of the user's code, for errors."""
    stream = peer.makefile("rwb")
    try:
        with asyncio.Runner() as runner:

            def awaited(value: Any) -> Any:
                return runner.run(resolved(value)) if inspect.isawaitable(value) else value

            def close() -> None:
                awaited(getattr(environment, "close", lambda: None)())

            environment: Any = None
            while frame := read_frame(stream):
                asked = _decode_asked(frame)
                if isinstance(asked, Engage):
                    _tell(stream, _ended(awaited(engage(new, asked))))
                elif isinstance(asked, Close):
                    close()
                    environment = None
                elif isinstance(asked, Task):
                    environment = new()
                    messages = tuple(awaited(environment.reset(asked)))
                    _tell(stream, Begun(messages, tuple(getattr(environment, "tools", ()))))
                else:
                    step = awaited(environment.step(asked.message))
                    _tell(stream, Stepped(msgspec.convert(step, Step, from_attributes=True)))
    except BaseException as error:  # sys.exit in a user's code must cost one episode
        _tell(stream, Failed(describe(error, module)))


def engage(agent: Callable[..., Any], asked: Engage) -> Any:
    """Calls an agent: with its task, and with what it names of base_url, api_key and model; the environment has them too."""
    os.environ |= {"OPENAI_BASE_URL": asked.base_url, KEY: asked.api_key}
    os.environ |= {"ANTHROPIC_BASE_URL": asked.base_url.removesuffix("/v1"), "ANTHROPIC_API_KEY": asked.api_key}
    known = {"base_url": asked.base_url, "api_key": asked.api_key, "model": MODEL}
    named, open_ended = named_parameters(inspect.signature(agent))
    return agent(asked.task, **{name: value for name, value in known.items() if open_ended or name in named})


def _ended(result: Any) -> AgentEnded:
    """A number, nothing, or a dict with `score`, whose other numbers become parts."""
    if isinstance(result, dict):
        return AgentEnded(float(result["score"]), {name: float(value) for name, value in result.items() if name != "score"})
    return AgentEnded(None if result is None else float(result), {})


def _tell(stream: BufferedRWPair, message: Told) -> None:
    try:
        body = msgspec.msgpack.encode(message)
    except (TypeError, UnicodeEncodeError) as error:
        body = msgspec.msgpack.encode(Failed(f"what the environment returned can't be sent: {error!a}"))
    stream.write(framed(body))
    stream.flush()


if __name__ == "__main__":
    fork_for(partial(load_episodes, sys.argv[1]), *map(int, sys.argv[2:]))
