"""Episodes from ticket to trajectory, with real processes and a scripted engine; and what becomes of those that fail."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import EpisodeSpec
from asyncrl.episodes.children import EpisodePool
from asyncrl.episodes.host import EpisodeHost
from asyncrl.episodes.session import Budget
from asyncrl.errors import ConfigError
from asyncrl.types import Generation, Trajectory

WAIT_S = 30.0
WIDE = Budget(tokens=1000, turn_tokens=4, context=1000)


@pytest.fixture
def make_host(environment, engine, make_chat, tmp_path: Path) -> Iterator[Callable[..., EpisodeHost]]:
    hosts = []

    def make(name: str = "Echo", budget: Budget = WIDE, arguments: dict[str, Any] | None = None, **spec: object) -> EpisodeHost:
        episode = EpisodeSpec(environment=environment(name), arguments=arguments or {}, **spec)
        pool = EpisodePool(episode, tmp_path / "log", start_timeout_s=WAIT_S)
        row = lambda row, purpose: json.dumps({"prompt": "hello", "row": row})  # noqa: E731
        hosts.append(EpisodeHost(engine, pool, make_chat(), episode, budget, row, seed=9))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


def run(host: EpisodeHost, ticket: Any) -> list[Trajectory]:
    made = [future.result(WAIT_S) for future in host.submit(ticket)]
    assert all(isinstance(one, Trajectory) for one in made)
    return made


def test_an_episode_of_two_turns(make_host, make_ticket, engine, ids) -> None:
    host = make_host()
    made, other = run(host, make_ticket([0, 3]))
    first = ids("<user> hello nl <assistant>")
    between = ids("nl <tool> here nl <assistant>")
    assert made.prompt_ids == tuple(first)
    assert made.token_ids == [6, 1, *between, 6, 1]
    assert made.loss_mask == [1, 1, *[0] * 5, 1, 1]
    assert (made.turns, made.segments, made.finish_reason) == ((0, 7), (0,), "stop")
    assert (made.episode.status, made.episode.stop, made.episode.reward, made.episode.parts) == ("ok", "done", 1.0, {"n": 2.0})
    roles = [message["role"] for message in json.loads(made.episode.messages)]
    assert roles == ["user", "assistant", "tool", "assistant", "tool"]
    assert other.token_ids == made.token_ids
    assert [request.group for request in engine.requests] == [5] * 4
    assert len({request.seed for request in engine.requests}) == 4
    assert host.gauges() | {"environment_s": 0.0, "engine_s": 0.0} == {
        "episodes": 2.0, "turns": 4.0, "stop/done": 2.0, "environment_s": 0.0, "engine_s": 0.0, "pool_restarts": 0.0
    }  # fmt: skip
    assert made.episode.turn_rewards == (0.5, 0.5)
    figures = made.episode.figures
    assert figures.pop("environment_s") > 0
    assert figures.pop("engine_s") > 0
    assert figures == {
        "turns": 2, "segments": 1, "tokens": 4, "read_tokens": 5, "tool_calls": 0, "tool_failures": 0, "malformed_calls": 0
    }  # fmt: skip


def test_processes_are_used_again_and_environments_are_not(make_host, make_ticket, tmp_path: Path) -> None:
    host = make_host("Async")
    for group in range(3):
        (made,) = run(host, make_ticket(group=group))
        assert (made.episode.reward, made.turns) == (1.0, (0,))
    until(lambda: (tmp_path / "log").read_text() == "closed\n" * 3)


@pytest.mark.parametrize(
    ("spec", "budget", "stop", "reason", "turns"),
    [
        ({"max_turns": 3}, WIDE, "max_turns", "stop", 3),
        ({}, Budget(tokens=5, turn_tokens=4, context=1000), "max_tokens", "length", 3),
        ({}, Budget(tokens=1000, turn_tokens=4, context=12), "max_tokens", "length", 2),
    ],
)
def test_what_ends_an_episode(make_host, make_ticket, spec: dict, budget: Budget, stop: str, reason: str, turns: int) -> None:
    (made,) = run(make_host(budget=budget, arguments={"turns": 100}, **spec), make_ticket())
    assert (made.episode.status, made.episode.stop, made.finish_reason) == ("ok", stop, reason)
    assert len(made.turns) == turns
    assert made.episode.reward == 0.5 * turns


@pytest.mark.parametrize(
    ("fail", "status", "error"),
    [
        ("raise", "invalid", r"ValueError: no such tool \(.*environments.py:\d+ in break_\)"),
        ("exit", "invalid", r"SystemExit: 3"),
        ("die", "invalid", "process died: exit code 3"),
        ("close", "invalid", "process died: exit code 1"),
        ("memory", "invalid", "MemoryError"),
        ("huge", "invalid", "bytes at once; at most"),
        ("junk", "invalid", "sent what can't be read"),
        ("hang", "timeout", r"within episode.step_deadline_s=0.3"),
        ("fork", "timeout", r"within episode.step_deadline_s=0.3"),
    ],
)
@pytest.mark.usefixtures("plain_numbers")
@pytest.mark.parametrize("at", [0, 2])
def test_a_failure_costs_its_own_episode(
    make_host, make_ticket, tmp_path: Path, fail: str, status: str, error: str, at: int
) -> None:
    host = make_host(arguments={"fail": fail, "at": at}, step_deadline_s=0.3, memory_bytes=4 << 30)
    (made,) = run(host, make_ticket())
    assert made.episode.status == status
    assert re.search(error, made.episode.error), made.episode.error
    assert made.episode.reward is None
    assert len(made.token_ids) == (0 if at == 0 else 9)  # what was sampled is kept
    assert host.gauges()[f"stop/{made.episode.stop}"] == 1.0
    if fail == "fork":
        child = int((tmp_path / "log").read_text().split()[-1])
        assert gone(child)
    (fine,) = run(make_host(), make_ticket())
    assert fine.episode.status == "ok"


@pytest.mark.usefixtures("contained")
def test_nothing_survives_its_episode(make_host, make_ticket, fifo) -> None:
    host = make_host(arguments={"fail": "flee", "fifo": fifo.path}, step_deadline_s=0.5)
    (made,) = run(host, make_ticket())
    assert made.episode.status == "timeout"
    fifo.wait_free()


@pytest.mark.usefixtures("contained")
def test_nothing_survives_its_host(make_host, make_ticket, fifo) -> None:
    host = make_host(arguments={"fail": "flee", "fifo": fifo.path})
    host.submit(make_ticket())
    fifo.wait_held()
    host.close()
    fifo.wait_free()


def test_threads_that_an_episode_leaves_hold_up_nobody(make_host, make_ticket) -> None:
    host = make_host(arguments={"fail": "leave"})
    assert [run(host, make_ticket(group=group))[0].episode.status for group in range(2)] == ["ok", "ok"]


@pytest.mark.usefixtures("plain_numbers")
def test_no_zombie_is_left_of_episodes(make_host, make_ticket, engine) -> None:
    """Whether they failed, or were given up as they began."""
    host = make_host(arguments={"fail": "die"})
    run(host, make_ticket([0, 1]))
    engine.held = []
    for group in range(6, 26):
        futures = host.submit(make_ticket([0, 1], group=group))
        host.abort(group)
        assert [future.result(WAIT_S).finish_reason for future in futures] == ["abort"] * 2
    keeper = host._pool._forks._forker.pid
    until(lambda: len(below(keeper)) == 1)


def below(pid: int) -> list[int]:
    """All processes that it has started, and they; those that wait to be reaped too."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # it has ended meanwhile
        return []
    return [*children, *(grandchild for child in children for grandchild in below(child))]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        os.sched_yield()
    return False


@pytest.mark.parametrize(
    ("name", "error"),
    [("Wrong", "can't be sent"), ("Empty", "can't show the environment's messages"), ("Plain", "Expected `object`")],
)
def test_what_an_environment_may_not_return(make_host, make_ticket, name: str, error: str) -> None:
    (made,) = run(make_host(name), make_ticket())
    assert made.episode.status == "invalid"
    assert error in made.episode.error


def test_a_prompt_that_leaves_no_room(make_host, make_ticket) -> None:
    (made,) = run(make_host(budget=Budget(tokens=1000, turn_tokens=4, context=4)), make_ticket())
    assert (made.episode.status, made.token_ids) == ("invalid", [])
    assert "its prompt of 4 tokens leaves no room for an answer in engine.max_length=4" in made.episode.error


def test_a_deadline_of_the_whole_episode(make_host, make_ticket, engine) -> None:
    engine.held = []
    (made,) = run(make_host(deadline_s=0.2), make_ticket())
    assert (made.episode.status, made.episode.stop) == ("timeout", "deadline")
    assert "episode.deadline_s=0.2" in made.episode.error


def test_much_printed_text_breaks_no_frame(make_host, make_ticket) -> None:
    (made,) = run(make_host(arguments={"fail": "print"}), make_ticket())
    assert made.episode.status == "ok"


def test_an_aborted_group_is_given_back(make_host, make_ticket, engine) -> None:
    engine.held = []
    host = make_host()
    futures = host.submit(make_ticket([0, 1]))
    for _ in futures:
        assert engine.arrived.acquire(timeout=WAIT_S)
    host.abort(5)
    made: list[Generation] = [future.result(WAIT_S) for future in futures]
    assert [(one.finish_reason, one.token_ids) for one in made] == [("abort", [])] * 2
    assert engine.aborted == [5]
    engine.held = None
    assert run(host, make_ticket())[0].episode.status == "ok"


def test_an_episode_that_is_killed_while_the_policy_answers_closes_its_environment(
    make_host, make_ticket, engine, tmp_path: Path
) -> None:
    engine.held = []
    host = make_host("Async")
    (future,) = host.submit(make_ticket())
    assert engine.arrived.acquire(timeout=WAIT_S)
    host.abort(5)
    assert future.result(WAIT_S).finish_reason == "abort"
    until(lambda: (tmp_path / "log").read_text() == "closed\n")


def test_an_answer_that_the_engine_gave_up_ends_the_episode(make_host, make_ticket, engine) -> None:
    engine.reason = "abort"
    (future,) = make_host().submit(make_ticket())
    assert future.result(WAIT_S).finish_reason == "abort"


def test_a_process_that_dies_as_it_starts_costs_its_episode(make_host, make_ticket, monkeypatch) -> None:
    host = make_host()
    monkeypatch.setattr(socket, "send_fds", lambda *_: 1)  # and what was to be sent is closed: nobody answers
    (made,) = run(host, make_ticket())
    assert (made.episode.status, made.episode.error) == ("invalid", "the environment's process died")


def test_episodes_that_wait_for_their_environments_leave_their_slots_to_others(make_host, make_ticket, engine) -> None:
    waiting = make_host(arguments={"fail": "hang"})
    futures = waiting.submit(make_ticket([0, 1, 2]))
    until(lambda: waiting.slots == 4 + 3)
    engine.held = []
    asking = make_host(in_flight=5)
    asked = asking.submit(make_ticket([0, 1]))
    for _ in (*futures, *asked):
        assert engine.arrived.acquire(timeout=WAIT_S)
    assert asking.slots == 4
    held, engine.held = engine.held, None
    for request, future in held:
        future.set_result(engine.answer(request))
    waiting.abort(5)
    assert [future.result(WAIT_S).finish_reason for future in (*futures, *asked)] == ["abort"] * 3 + ["stop"] * 2
    assert (waiting.slots, asking.slots) == (4, 4)
    more = make_host(arguments={"fail": "hang"}, in_flight=5)
    more.submit(make_ticket([0, 1, 2]))
    until(lambda: more.slots == 5)


def test_progress_never_falls(make_host, make_ticket, engine) -> None:
    host = make_host()
    seen = [host.progress()]
    engine.held = []
    futures = host.submit(make_ticket())
    assert engine.arrived.acquire(timeout=WAIT_S)
    seen.append(host.progress())
    engine.abort(5)
    assert futures[0].result(WAIT_S).finish_reason == "abort"
    seen.append(host.progress())
    assert seen[0] == 0 < seen[1] <= seen[2]


def test_a_process_that_dies_between_episodes_costs_none(make_host, make_ticket) -> None:
    host = make_host()
    run(host, make_ticket())
    (idle,) = host._pool._idle
    os.kill(host._pool._forks._forker.pid, signal.SIGKILL)  # and all below it
    until(lambda: idle._news.done())
    (made,) = run(host, make_ticket())
    assert (made.episode.status, host.gauges()["pool_restarts"]) == ("ok", 1.0)


def test_a_killed_forker_is_replaced(make_host, make_ticket) -> None:
    host = make_host()
    os.kill(host._pool._forks._forker.pid, signal.SIGKILL)
    host._pool._forks._forker.wait()
    assert run(host, make_ticket())[0].episode.status == "ok"
    assert host.gauges()["pool_restarts"] == 1.0


@pytest.mark.usefixtures("plain_numbers")
def test_close_leaves_no_process(make_host, make_ticket, engine) -> None:
    engine.held = []
    host = make_host()
    futures = host.submit(make_ticket([0, 1, 2]))
    for _ in futures:
        assert engine.arrived.acquire(timeout=WAIT_S)
    keeper = host._pool._forks._forker.pid
    processes = [keeper, *below(keeper)]
    assert len(processes) == 2 + 2 * 3
    host.close()
    assert [future.result(WAIT_S).finish_reason for future in futures] == ["abort"] * 3
    assert all(gone(pid) for pid in processes)


def test_an_environment_that_cannot_be_loaded(environment, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"episode\.environment=.*:Ecko'.*did you mean 'Echo'"):
        EpisodePool(EpisodeSpec(environment=environment("Ecko")), tmp_path / "log", WAIT_S)
    with pytest.raises(ConfigError, match=r"Echo: '/no/python' can't be started \(No such file or directory\); name a Python"):
        EpisodePool(EpisodeSpec(environment=environment("Echo"), python="/no/python"), tmp_path / "log", WAIT_S)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)")
    with pytest.raises(ConfigError, match=r"not loaded after start_timeout_s=0\.2"):
        EpisodePool(EpisodeSpec(environment=f"{tmp_path}/slow.py:E"), tmp_path / "log", 0.2)
    (tmp_path / "dies.py").write_text("import os\nos._exit(1)")
    with pytest.raises(ConfigError, match=r"died: exit code 1 while its file was being loaded; see .*log"):
        EpisodePool(EpisodeSpec(environment=f"{tmp_path}/dies.py:E"), tmp_path / "log", WAIT_S)


@pytest.mark.usefixtures("plain_numbers")
def test_episodes_end_with_a_killed_host(environment, tmp_path: Path) -> None:
    """However the generator dies: its environments' processes go with it."""
    script = """
import asyncio, os, sys
from asyncrl.config import EpisodeSpec
from asyncrl.episodes.children import EpisodePool
async def main():
    pool = EpisodePool(EpisodeSpec(environment=sys.argv[1]))
    running = [await pool.start(), await pool.start()]
    print(pool._forks._forker.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    owner = subprocess.Popen([sys.executable, "-c", script, environment("Echo")], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    keeper = int(owner.stdout.readline())
    pids = [keeper, *below(keeper)]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert len(pids) == 2 + 2 * 2
    assert all(gone(pid) for pid in pids)
