"""Agents that reach the policy through an OpenAI API, with the real SDK."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import EpisodeSpec
from asyncrl.episodes.children import EpisodePool
from asyncrl.episodes.gateway import RETURN_S
from asyncrl.episodes.host import EpisodeHost
from asyncrl.episodes.session import Budget
from asyncrl.types import Trajectory

pytest.importorskip("openai", reason="needs openai (pip install 'asyncrl[test]')")
WAIT_S = 60.0
WIDE = Budget(tokens=1000, turn_tokens=4, context=1000)
SIGKILLED = "the environment's process died: SIGKILL (out of memory?)"


@pytest.fixture
def make_host(environment, engine, make_chat, tmp_path: Path) -> Iterator[Callable[..., EpisodeHost]]:
    hosts = []

    def make(name: str = "agent", kind: str = "", budget: Budget = WIDE, **spec: Any) -> EpisodeHost:
        episode = EpisodeSpec(agent=environment(name), arguments={"kind": kind} if name == "agent" else {}, **spec)
        pool = EpisodePool(episode, tmp_path / "log", start_timeout_s=WAIT_S)
        hosts.append(EpisodeHost(engine, pool, make_chat(), episode, budget, lambda row, purpose: "{}", seed=9))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def play(make_host, make_ticket) -> Callable[..., Trajectory]:
    """play(agent, kind): its episode."""

    def run(*names: str, **how: Any) -> Trajectory:
        host = make_host(*names, **how)
        (future,) = host.submit(make_ticket())
        made = future.result(WAIT_S)
        assert host._gateway._open == {}
        return made

    return run


def test_an_agent_of_the_openai_sdk(play, ids) -> None:
    made = play()
    assert (made.episode.status, made.episode.error) == ("ok", "")
    assert (made.episode.reward, made.episode.parts) == (0.5, {"calls": 2.0})
    assert made.prompt_ids == tuple(ids("<user> hello nl <assistant>"))
    assert made.token_ids == [6, 1, *ids("nl <user> here nl <assistant>"), 6, 1]
    assert (made.turns, made.segments) == ((0, 7), (0,))
    assert [message["role"] for message in json.loads(made.episode.messages)] == ["user", "assistant", "user", "assistant"]


def test_the_gateway_is_reached_past_a_proxy(play, monkeypatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert play().episode.error == ""


def test_a_branch_is_a_segment(play, ids) -> None:
    made = play(kind="branch")
    assert made.segments == (0, 9)
    context = ids("<user> hello nl <assistant> look <eos> nl <user> here nl <assistant>")
    assert made.token_ids[9:] == [*context, 6, 1]
    assert made.loss_mask[9:] == [0] * len(context) + [1, 1]


def test_sampling_is_the_recipes_and_answers_may_only_be_shorter(play, engine) -> None:
    made = play(kind="short")
    assert [request.sampling.max_tokens for request in engine.requests] == [1, 4]
    assert {request.sampling.temperature for request in engine.requests} == {1.0}
    assert made.token_ids[:1] == [6]


@pytest.mark.parametrize("kind", ["stream", "models"])
def test_streams_and_the_list_of_models(play, kind: str) -> None:
    made = play(kind=kind)
    assert (made.episode.error, made.episode.status) == ("", "ok")
    assert made.token_ids[:2] == [6, 1]


@pytest.mark.parametrize(("kind", "status"), [("long", 400), ("junk", 400)])
def test_calls_that_are_refused(play, kind: str, status: int) -> None:
    budget = Budget(tokens=1000, turn_tokens=4, context=4) if kind == "long" else WIDE
    made = play(kind=kind, budget=budget)
    assert (made.episode.reward, made.episode.parts) == (status, {kind: 1.0})
    assert made.token_ids == []


@pytest.mark.parametrize(
    ("kind", "error", "turns"), [("raise", "ValueError: no idea", 0), ("many", "episode.max_turns=3 calls were made", 3)]
)
def test_an_agent_that_fails_costs_its_episode(play, kind: str, error: str, turns: int) -> None:
    made = play(kind=kind, max_turns=3)
    assert made.episode.status == "invalid"
    assert error in made.episode.error
    assert sum(made.loss_mask) == 2 * turns


def test_a_call_that_is_repeated_is_answered_once(play, engine) -> None:
    made = play("retrying")
    assert (made.episode.status, made.episode.reward, made.token_ids) == ("ok", None, [6, 1])
    assert len(engine.requests) == 1


def test_a_stranger_is_refused(play) -> None:
    assert play("stranger").episode.reward == 401


def test_an_agent_that_waits_too_long_gives_its_slot_back(play, engine) -> None:
    engine.held = []
    assert play(deadline_s=8.0).episode.status == "timeout"
    assert len(engine.requests) == 1
    assert engine.cancelled.acquire(timeout=RETURN_S / 2)  # it waits for no client to come back


def test_an_agent_that_dies_in_a_call_gives_its_slot_back(make_host, make_ticket, engine) -> None:
    engine.held = []
    host = make_host()
    (future,) = host.submit(make_ticket())
    assert engine.arrived.acquire(timeout=WAIT_S)
    pid = host._pool._forks._forker.pid
    while child := Path(f"/proc/{pid}/task/{pid}/children").read_text():
        pid = int(child)
    os.kill(pid, signal.SIGKILL)
    made = future.result(WAIT_S)
    assert (made.episode.status, made.episode.error, made.token_ids) == ("invalid", SIGKILLED, [])
    assert engine.cancelled.acquire(timeout=RETURN_S / 2)  # it waits for no client to come back


def test_an_agent_that_hides_that_the_engine_failed_is_not_believed(play, engine) -> None:
    engine.reason = "abort"
    assert play(kind="hide").finish_reason == "abort"


def test_an_answer_that_the_engine_gave_up_ends_the_episode(play, engine) -> None:
    engine.reason = "abort"
    assert play().finish_reason == "abort"
