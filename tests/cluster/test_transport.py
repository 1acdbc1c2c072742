"""Where peers are, and calls to a store that is not there, under the errors that Ray has for it."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

from asyncrl.cluster.transport import ANSWERS, Peers, RayBus, RayCall, RayModel
from asyncrl.errors import Closed, Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.replay.client import ReplayClient


class FakeStore:
    """A handle whose calls raise these errors one by one, and are then answered; calls: how many there were."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.calls = 0
        self.call = SimpleNamespace(options=lambda concurrency_group: SimpleNamespace(remote=self._remote))

    def _remote(self, *arguments: Any) -> Any:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return ray.put(arguments)


def lost_connection() -> ActorUnavailableError:
    return ActorUnavailableError("connection refused", actor_id=None)


def ask(peers: Peers, retry_s: float = 30.0) -> int:
    """What a client sends, and the store echoes."""
    _, key, since = ReplayClient(RayCall(peers), "worker", 0, retry_s=retry_s).report(7)
    assert key.sequence == 1, "asked again under another key"
    return since


@pytest.mark.ray
def test_a_store_whose_connection_was_lost_is_asked_again(local_ray):
    peers, store = Peers(), FakeStore(lost_connection(), lost_connection())
    peers.put("store", 0, store)
    assert ask(peers) == 7
    assert store.calls == 3


@pytest.mark.ray
@pytest.mark.parametrize("error", [ActorDiedError(), OutOfMemoryError("killed by the memory monitor")])
def test_a_dead_store_is_not_asked_but_its_successor(local_ray, error):
    peers, dead, heir = Peers(), FakeStore(error), FakeStore()
    peers.put("store", 0, dead)
    dead.call.options = lambda concurrency_group: SimpleNamespace(
        remote=lambda *_: (peers.put("store", 1, heir), dead._remote())
    )
    assert ask(peers) == 7
    assert (dead.calls, heir.calls) == (1, 1)


@pytest.mark.parametrize(
    ("error", "told"), [(ActorDiedError(), "no living incarnation was announced"), (lost_connection(), "connection refused")]
)
def test_one_that_stays_away_is_unavailable_in_time(error, told):
    peers = Peers()
    peers.put("store", 0, FakeStore(*[error] * 1000))
    began = time.monotonic()
    with pytest.raises(Unavailable, match=told):
        ask(peers, retry_s=0.3)
    assert time.monotonic() - began < 10.0


@pytest.mark.ray
def test_a_generator_asks_the_learner_that_lives_for_keys_of_its_own(local_ray):
    asked = []

    def learner(*errors: Exception) -> SimpleNamespace:
        def remote(*arguments: Any) -> Any:
            asked.append(arguments)
            if errors:
                raise errors[0]
            return ray.put("address")

        return SimpleNamespace(ask=SimpleNamespace(remote=remote))

    peers = Peers()
    bus = RayBus(peers, "generator-3", 7)
    assert bus() is None
    assert not bus.moved()
    peers.put("bus", 0, learner(ActorDiedError()))
    with pytest.raises(Unavailable, match="learner: out of reach"):
        bus()
    peers.put("bus", 1, learner())
    assert bus.moved()
    assert bus() == "address"
    assert not bus.moved()
    peers.put("bus", 2, learner())
    assert bus.moved()
    assert asked == [("admit", "generator-3", 7)] * 2


def test_the_kinds_of_callers_do_not_share_an_event_loop():
    """A long poll of generators or reward workers must never hold up a commit, nor the supervisor."""
    loops = {}
    for name, verb in VERBS.items():
        loops.setdefault(verb.caller, set()).add(name)
    assert loops == {
        "GeneratorStore": {"reserve", "recall", "stream", "submit"},
        "RewardStore": {"lease_unscored", "extend", "score"},
        "LearnerStore": {"lineage", "fence", "lease_batch", "rows", "commit", "request_eval", "checkpointed"},
        "SupervisorStore": {"finish", "forget", "limit_outstanding", "report", "state"},
    }
    assert {name for name, verb in VERBS.items() if verb.waits} == {"reserve", "lease_unscored", "lease_batch"}


def soon() -> float:
    return time.monotonic() + 10.0


def test_a_known_peer_is_returned_at_once():
    peers = Peers()
    peers.put("store", 0, "first")
    assert peers.wait("store", -1, soon()) == (0, "first")
    assert peers.peek("store") == "first"
    assert peers.peek("bus") is None


def test_an_older_restart_count_changes_nothing():
    peers = Peers()
    peers.put("store", 2, "newer")
    peers.put("store", 1, "older")
    assert peers.wait("store", -1, soon()) == (2, "newer")


def test_a_waiter_is_woken_by_a_newer_restart_count_only():
    peers, got = Peers(), []
    peers.put("store", 0, "dead")
    waiter = threading.Thread(target=lambda: got.append(peers.wait("store", 0, soon())))
    waiter.start()
    peers.put("bus", 5, "other")
    peers.put("store", 1, "alive")
    waiter.join(timeout=10)
    assert got == [(1, "alive")]


def test_no_peer_before_the_deadline_is_named():
    with pytest.raises(Unavailable, match="store"):
        Peers().wait("store", -1, time.monotonic())


def test_close_wakes_a_waiter():
    peers, raised = Peers(), []

    def wait() -> None:
        try:
            peers.wait("store", -1, soon())
        except Closed as error:
            raised.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    peers.close()
    waiter.join(timeout=10)
    assert raised == ["stopped while waiting for store"]


class FakeModel:
    """The handle of an actor that answers with its name; dead once it is told so."""

    def __init__(self, name: str, dead: bool = False, silent: bool = False) -> None:
        self.name, self.dead, self.silent = name, dead, silent
        self.ask = self

    def options(self, concurrency_group: str) -> Any:
        assert concurrency_group == ANSWERS
        return self

    async def remote(self, method: str, chat: str) -> str:
        if self.dead:
            raise ActorDiedError()
        await asyncio.sleep(60 * self.silent)
        return f"{self.name} {method}s {chat}"


def test_models_are_asked_in_turn_and_a_dead_one_when_another_is_there_in_its_place():
    peers = Peers()
    a, b = FakeModel("a"), FakeModel("b")
    peers.put("a", 0, a)
    peers.put("b", 0, b)
    model = RayModel(peers, ["a", "b"], deadline_s=20.0, patience_s=20.0)

    async def asked(count: int) -> list[str]:
        return [await model("x") for _ in range(count)]

    assert asyncio.run(asked(4)) == ["a answers x", "b answers x"] * 2
    a.dead = True
    with pytest.raises(Unavailable, match="a: it died while it was asked"):
        asyncio.run(asked(2))
    assert asyncio.run(asked(3)) == ["b answers x"] * 3, "nobody waits for the dead one while another is up"
    peers.put("a", 1, FakeModel("a2"))
    assert {*asyncio.run(asked(2))} == {"a2 answers x", "b answers x"}


def test_while_no_model_is_up_a_question_waits_and_its_deadline_does_not_run():
    peers = Peers()
    model = RayModel(peers, ["a"], deadline_s=0.2, patience_s=20.0)

    async def ask() -> str:
        asked = asyncio.ensure_future(model("x"))
        await asyncio.sleep(0.4)  # twice its deadline
        assert not asked.done()
        peers.put("a", 0, FakeModel("a"))
        return await asked

    assert asyncio.run(ask()) == "a answers x"
    peers.put("a", 1, FakeModel("a", silent=True))
    with pytest.raises(TimeoutError):
        asyncio.run(model("x"))


def test_a_question_that_waits_for_a_model_ends_with_the_run_or_the_patience():
    peers = Peers()
    with pytest.raises(Unavailable, match="no living incarnation"):
        asyncio.run(RayModel(peers, ["a"], deadline_s=1.0, patience_s=0.05)("x"))
    peers.close()
    with pytest.raises(Closed):
        asyncio.run(RayModel(peers, ["a"], deadline_s=1.0, patience_s=20.0)("x"))
