"""What the publisher makes of receivers that vanish, on a clock that the test moves."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncrl.models.memory import WeightMemory
from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.messages import Bye, Hello, Manifest
from asyncrl.weights.serving import FETCH_IDLE_S, FETCH_MAX_S, PROBE_S, Live, Receiver, Serving, VersionCache
from asyncrl.weights.sockets import PublisherSocket, Waker

HELLO = messages.encode(Hello(receiver="generator-7", sequence=1))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server() -> Iterator[PublisherSocket]:
    made = PublisherSocket("127.0.0.1", incarnation=1)
    yield made
    made.close()


@pytest.fixture
def serving(server: PublisherSocket, clock: Clock) -> Iterator[Serving]:
    waker = Waker()
    yield Serving(server.socket, waker, threading.Condition(), clock)
    waker.close()


def receivers(serving: Serving) -> tuple[float, float]:
    serving.step(0.05)
    gauges = serving.gauges()
    return gauges["receivers"], gauges["receivers_lost"]


def test_a_dead_receiver_is_named_once_and_forgotten(
    serving: Serving,
    server: PublisherSocket,
    clock: Clock,
    raw_dealer: Callable[..., Any],
    until: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    dealer = raw_dealer(server.address)
    dealer.send(HELLO)
    until(lambda: receivers(serving) == (1, 0))
    clock.now += 2 * PROBE_S
    assert receivers(serving) == (1, 0)  # silent, but there
    dealer.close()  # without a Bye, as when killed

    def probed_again() -> bool:
        clock.now += 2 * PROBE_S
        return receivers(serving) == (0, 1)

    until(probed_again)
    assert [record.getMessage() for record in caplog.records] == [
        "weight receiver generator-7 is silent and out of reach, holding nothing"
    ]
    raw_dealer(server.address).send(HELLO)  # restarted under its name
    until(lambda: receivers(serving) == (1, 1))


def test_a_goodbye_is_no_loss_however_late_it_is_read(
    serving: Serving, server: PublisherSocket, raw_dealer: Callable[..., Any], until: Callable[..., Any]
) -> None:
    dealer = raw_dealer(server.address)
    dealer.send(HELLO)
    until(lambda: receivers(serving) == (1, 0))
    dealer.send(HELLO)
    dealer.send(messages.encode(Bye()))
    dealer.close(linger=5000)
    until(lambda: receivers(serving) == (0, 0))


# ------------------------------------------------------------------------------------------------ the versions


def live(update: int) -> Live:
    manifest = Manifest(version=Version(1, update), tensors=(), total_bytes=0, bucket_bytes=1, checksums=())
    return Live(manifest=manifest, memory=WeightMemory.create(0, "weights"))


def updates(versions: VersionCache) -> list[int]:
    return [u for u in range(10) if versions.find(Version(1, u))]


@pytest.fixture
def versions() -> VersionCache:
    """Versions 1 and 2; 1 was superseded at time 100."""
    made = VersionCache()
    made.add(live(1), 50.0)
    made.add(live(2), 100.0)
    return made


def puller(heard_at: float) -> Receiver:
    return Receiver(name="g", pulling=Version(1, 1), heard_at=heard_at)


def test_the_first_two_versions_both_stay(versions: VersionCache) -> None:
    assert updates(versions) == [1, 2]
    assert versions.newest is not None
    assert versions.newest.version == Version(1, 2)


@pytest.mark.parametrize(
    ("receivers", "now", "left"),
    [
        ([], 101.0, [2]),  # nobody pulls: the older goes
        ([puller(101.0)], 101.0, [1]),  # the older is being pulled: the one between is dropped
        ([puller(101.0 - FETCH_IDLE_S)], 101.0, [2]),  # its puller stalled
        ([puller(100.0 + FETCH_MAX_S)], 100.0 + FETCH_MAX_S, [2]),  # its puller takes for ever
        ([Receiver(name="g", holds=Version(1, 1), heard_at=101.0)], 101.0, [2]),  # holding isn't pulling
    ],
)
def test_making_room(versions: VersionCache, receivers: list[Receiver], now: float, left: list[int]) -> None:
    versions.make_room(receivers, now)
    assert updates(versions) == left


def test_a_slow_pull_ends_however_fast_versions_come(versions: VersionCache) -> None:
    for update in range(3, 9):
        versions.make_room([puller(101.0)], 101.0)
        versions.add(live(update), 101.0)
        assert len(versions) == 2
        assert updates(versions) == [1, update]
