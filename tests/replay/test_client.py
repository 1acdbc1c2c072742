"""The client over transports that lose calls, lose answers, and lose the store."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.errors import Closed, Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.store import ReplayStore
from asyncrl.types import Key, Score, Version

V = Version(1, 0)


@pytest.fixture
def call(fakes: SimpleNamespace, tmp_path: Path, loop: Any) -> Callable[..., Any]:
    store = ReplayStore(fakes.plan(max_lag=1, batch=2, evals=1), tmp_path)
    return loop.transport(store)


def test_a_whole_round_through_the_protocols(fakes: SimpleNamespace, call: Callable[..., Any]) -> None:
    generator, reward, learner = (ReplayClient(call, name, 1, run="r") for name in ("gen", "reward", "learner"))
    assert learner.fence(0).incarnation == 1
    learner.checkpointed(0)
    tickets = generator.reserve(2, V, [], 1.0).tickets
    generator.submit([fakes.rollout(t, i, V) for t in tickets for i in t.rollouts])
    generator.submit([])
    lease = reward.lease_unscored(8, 1.0)
    assert [(u.group, u.rollout) for u in lease.items] == [(t.group, i) for t in tickets for i in t.rollouts]
    reward.extend(lease.lease)
    reward.score(
        lease.lease,
        [
            Score(group=u.group, rollout=u.rollout, attempt=u.attempt, status="ok", reward=u.rollout, parts={"p": 2.0})
            for u in lease.items
        ],
    )
    batch = learner.lease_batch(0, 1.0)
    rows = learner.rows(batch.groups)
    assert [(r.group, r.rollout, r.reward, r.parts) for r in rows] == [
        (t.group, i, float(i), {"p": 2.0}) for t in tickets for i in t.rollouts
    ]
    learner.commit(batch.lease, Version(1, 1), {"loss": 0.5})
    learner.request_eval(Version(1, 1))
    (ticket,) = generator.reserve(1, Version(1, 1), [], 1.0).tickets
    assert (ticket.purpose, ticket.pinned) == ("eval", Version(1, 1))


@pytest.mark.parametrize("lost", ["call", "answer"])
def test_a_lost_call_or_answer_takes_effect_once(fakes: SimpleNamespace, call: Callable[..., Any], lost: str) -> None:
    keys: list[Any] = []

    def lossy(method: str, *args: Any, timeout_s: float) -> Any:
        keys.append(args[0])
        first = len(keys) == 1 or keys[-1] != keys[-2]
        answer = None if lost == "call" and first else call(method, *args, timeout_s=timeout_s)
        if first:
            raise Unavailable("store: connection lost")
        return answer

    client = ReplayClient(lossy, "gen", 1)
    tickets = client.reserve(2, V, [], 1.0).tickets
    assert [t.attempt for t in tickets] == [0, 0]
    client.submit([fakes.rollout(tickets[0], 0, V)])
    assert keys == [keys[0]] * 2 + [keys[2]] * 2
    assert keys[2].sequence == keys[0].sequence + 1


def test_without_a_store_the_deadline_holds() -> None:
    def gone(method: str, *args: Any, timeout_s: float) -> Any:
        raise Unavailable("store: gone for good")

    with pytest.raises(Unavailable, match="gone for good"):
        ReplayClient(gone, "gen", 1, retry_s=0.1).reserve(1, V, [], 0.0)


def test_close_ends_the_repeating() -> None:
    def gone(method: str, *args: Any, timeout_s: float) -> Any:
        client.close()
        raise Unavailable("store: gone")

    client = ReplayClient(gone, "gen", 1, retry_s=60.0)
    with pytest.raises(Closed):
        client.extend(1)


def test_a_verb_that_no_protocol_declares_is_refused_in_the_callers_process(call: Callable[..., Any]) -> None:
    client = ReplayClient(call, "gen", 1)
    with pytest.raises(AttributeError, match="no verb 'reserved': its verbs are reserve, recall, submit"):
        client.reserved(1)
    with pytest.raises(TypeError, match="missing a required argument"):
        client.reserve(1)
    assert client.reserve(k=1, version=V, held=[], wait_s=0.0).tickets  # by name, as the protocol has it


def test_a_malformed_call_of_another_client_does_no_harm(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError):
        call("reserve", Key("gen", 1, 1), 1, timeout_s=1.0)
    assert ReplayClient(call, "gen", 1).reserve(1, V, [], 0.0).tickets


def test_every_verb_is_a_method_of_one_part_and_has_its_protocols_arguments(fakes: SimpleNamespace) -> None:
    core = fakes.Bench(fakes.plan()).core
    assert set(core.verbs) == set(VERBS)
    for name, verb in VERBS.items():
        implemented = list(inspect.signature(core.verbs[name]).parameters)
        declared = list(verb.signature.parameters)
        assert implemented[0] == "caller"
        assert len(implemented) == len(declared)  # `caller` in place of `self`
        assert name in ("submit", "stream") or implemented[1:] == declared[1:]  # whose rollouts and pieces come as rows
    core.scoring.commit = lambda caller: None
    with pytest.raises(TypeError, match="2 parts of the store have a method 'commit'"):
        core._handler("commit")
