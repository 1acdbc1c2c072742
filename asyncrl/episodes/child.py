"""The processes that run users' environments: `python -m asyncrl.episodes.child EPISODE LIFELINE`, EpisodeSpec as JSON.

It loads the user's code once, then forks itself for every episode that is under way at a time: so each can be killed, and
starts in milliseconds. Its standard input is a socket. A byte that comes with a descriptor asks for a fork, which talks over
that; a number asks to reap one: it keeps its number until then, so that nobody kills another process in its place.

    host ── Task | Reply ──► fork                frames: length in bytes, then msgpack; a Task begins the next episode
    host ◄── Forked, Begun | Stepped | Failed ── fork

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
from asyncrl.episodes.environments import Message, Step, Task
from asyncrl.episodes.tools import prepare_tools, resolved
from asyncrl.errors import ConfigError
from asyncrl.processes import end_with_owner, framed, read_frame

LONGEST = 64 << 20  # bytes of a frame
LONGEST_ERROR = 10_000  # characters
MODEL = "policy"  # what agents call it


class Reply(Struct, frozen=True, tag="reply"):
    message: Message


class Engage(Struct, frozen=True, tag="engage"):
    """Begins an agent's episode: where it reaches the policy."""

    task: Task
    base_url: str
    api_key: str


class AgentEnded(Struct, frozen=True, tag="ended"):
    """What an agent returned: what it earned, if it says so."""

    reward: float | None
    parts: dict[str, float]


class Forked(Struct, frozen=True, tag="forked"):
    """A process is ready: the one that forks, or a fork."""

    pid: int


class Begun(Struct, frozen=True, tag="begun"):
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Stepped(Struct, frozen=True, tag="stepped"):
    step: Step


class Failed(Struct, frozen=True, tag="failed"):
    error: str


Told = Forked | Begun | Stepped | AgentEnded | Failed
decode_told = msgspec.msgpack.Decoder(Told).decode
_decode_asked = msgspec.msgpack.Decoder(Task | Reply | Engage).decode


def fork_episodes(episode: str, lifeline: int) -> int:
    """Forks episodes until the owner closes its end. Returns the exit code: 1 if the environment can't be loaded."""
    end_with_owner(lifeline)
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    spec = msgspec.json.decode(episode, type=EpisodeSpec)
    try:
        named = spec.environment or spec.agent
        make = load_callable(named, "episode.environment" if spec.environment else "episode.agent") if named else None
        tools = [load_callable(tool, "episode.tools") for tool in spec.tools]
        prepare_tools(make, tools)
    except ConfigError as error:
        control.send(msgspec.msgpack.encode(Failed(str(error)[:LONGEST_ERROR])))
        return 1
    control.send(msgspec.msgpack.encode(Forked(os.getpid())))
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, 16, 1)
        if not asked:
            return 0
        if not descriptors:
            os.waitpid(int(asked), 0)
        elif os.fork():
            os.close(descriptors[0])
        else:
            control.close()
            new: Callable[..., Any] = partial(environment_of, make, spec.arguments, tools)
            if spec.agent and make is not None:
                new = partial(make, **spec.arguments)
            run_episodes(new, getattr(make, "__module__", ""), socket.socket(fileno=descriptors[0]), lifeline)


def run_episodes(new: Callable[..., Any], module: str, peer: socket.socket, lifeline: int) -> None:
    """In a fork: one episode after the other until the host closes its end, or one fails; then ends the process. new: makes an
    environment, or is the agent. module: of the user's code, for errors."""
    os.setpgid(0, 0)
    end_with_owner(lifeline, shared=True)
    stream = peer.makefile("rwb")
    _tell(stream, Forked(os.getpid()))
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
                elif isinstance(asked, Task):
                    close()
                    environment = new()
                    messages = tuple(awaited(environment.reset(asked)))
                    _tell(stream, Begun(messages, tuple(getattr(environment, "tools", ()))))
                else:
                    step = awaited(environment.step(asked.message))
                    _tell(stream, Stepped(msgspec.convert(step, Step, from_attributes=True)))
            close()
    except BaseException as error:  # sys.exit in a user's code must cost one episode
        _tell(stream, Failed(describe(error, module)))
    finally:
        os._exit(0)


def engage(agent: Callable[..., Any], asked: Engage) -> Any:
    """Calls an agent: with its task, and with what it names of base_url, api_key and model; the environment has them too."""
    os.environ |= {"OPENAI_BASE_URL": asked.base_url, "OPENAI_API_KEY": asked.api_key}
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
    sys.exit(fork_episodes(sys.argv[1], int(sys.argv[2])))
