"""What the publisher makes of receivers that vanish or stall, on a clock that the test moves."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncrl.models.memory import FlatTensors
from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.flight import STALLED_S, Flight
from asyncrl.weights.messages import Announce, Bucket, Bye, GetBucket, Hello, Manifest
from asyncrl.weights.serving import MAX_ASKED, PROBE_S, Serving
from asyncrl.weights.sockets import PublisherSocket, Waker
from asyncrl.weights.versions import Live

HELLO = messages.encode(Hello(sequence=1))


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
    yield Serving(server, waker, threading.Condition(), clock, Flight(each_bytes=3000, total_bytes=8000))
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
    dealer = raw_dealer(server.admit("generator-0"))
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
        "weight receiver generator-0 is silent and out of reach, holding nothing"
    ]
    raw_dealer(server.admit("generator-0")).send(HELLO)  # restarted under its name
    until(lambda: receivers(serving) == (1, 1))


def test_who_comes_back_in_the_moment_of_the_probe_keeps_its_key(
    serving: Serving, server: PublisherSocket, clock: Clock, raw_dealer: Callable[..., Any], until: Callable[..., Any]
) -> None:
    address = server.admit("generator-0")
    first = raw_dealer(address)
    first.send(HELLO)
    until(lambda: receivers(serving) == (1, 0))
    first.close()
    raw_dealer(address).send(HELLO)
    assert server.socket.poll(20_000)  # it waits to be read
    clock.now += 2 * PROBE_S
    assert receivers(serving) == (1, 0)
    assert server.admits(address.client_public)


def test_a_goodbye_is_no_loss_however_late_it_is_read(
    serving: Serving, server: PublisherSocket, raw_dealer: Callable[..., Any], until: Callable[..., Any]
) -> None:
    dealer = raw_dealer(server.admit("generator-0"))
    dealer.send(HELLO)
    until(lambda: receivers(serving) == (1, 0))
    dealer.send(HELLO)
    dealer.send(messages.encode(Bye()))
    dealer.close(linger=5000)
    until(lambda: receivers(serving) == (0, 0))


def test_whose_key_is_void_hears_of_no_version_any_more(
    asker: Callable[[str], "Asker"], serving: Serving, server: PublisherSocket, until: Callable[..., Any]
) -> None:
    void, other = asker("generator-0"), asker("generator-1")
    until(lambda: receivers(serving) == (2, 0))
    server.admit("generator-0", incarnation=1)
    serving.hint_all()
    assert receivers(serving) == (1, 0)
    until(lambda: other.dealer.poll(0) and not other.read() and other.hints == 1)
    void.read()
    assert (void.echoes, void.hints) == ([1], 0)


# ------------------------------------------------------------------------------------------------ bytes in flight


class Asker:
    """A receiver that a test plays by hand, over its own connection."""

    def __init__(self, name: str, dealer: Any) -> None:
        self.name, self.dealer, self.hellos = name, dealer, 0
        self.got: list[int] = []  # numbers of the buckets that came
        self.echoes: list[int] = []
        self.hints = 0

    def hello(self, confirms: int = 0) -> None:
        self.hellos += 1
        self.dealer.send(messages.encode(Hello(sequence=self.hellos, confirms=confirms)))

    def ask(self, count: int, confirms: int = 0) -> None:
        for _ in range(count):
            self.dealer.send(messages.encode(GetBucket(version=Version(1, 1), index=0, confirms=confirms)))

    def read(self) -> None:
        while self.dealer.poll(0):
            match messages.decode_reply(self.dealer.recv_multipart()[0]):
                case Bucket(number=number):
                    self.got.append(number)
                case Announce(echo=0):
                    self.hints += 1
                case Announce(echo=echo):
                    self.echoes.append(echo)


@pytest.fixture
def asker(
    serving: Serving, server: PublisherSocket, raw_dealer: Callable[..., Any], packed: Callable[..., Any], weights: Any
) -> Callable[[str], Asker]:
    """asker(name): a receiver of version 1.1, whose buckets have 1000 bytes each."""
    manifest: Manifest = packed(Version(1, 1), weights(1))[1]
    serving.show(Live(manifest=manifest, memory=FlatTensors.copy_of(weights(1), "weights").memory))

    def make(name: str) -> Asker:
        made = Asker(name, raw_dealer(server.admit(name)))
        made.hello()
        return made

    return make


def test_a_receiver_that_confirms_nothing_gets_its_share_and_keeps_its_order(
    serving: Serving, asker: Callable[[str], Asker], until: Callable[..., Any]
) -> None:
    stalled, healthy = asker("stalled"), asker("healthy")

    def turn() -> None:
        serving.step(0.01)
        stalled.read()
        healthy.read()

    stalled.ask(20)
    stalled.hello()  # its answer comes after all that was asked before
    until(lambda: (turn(), len(stalled.got) == 3)[-1])
    for count in range(1, 21):  # the other is served as if it were alone
        healthy.ask(1, confirms=count - 1)
        until(lambda count=count: (turn(), len(healthy.got) == count)[-1])
    assert serving.gauges()["flight_bytes"] <= 4000
    assert (stalled.got, stalled.echoes) == ([1, 2, 3], [1])
    stalled.hello(confirms=3)
    until(lambda: (turn(), len(stalled.got) == 6)[-1])
    while len(stalled.got) < 20:
        before = len(stalled.got)
        stalled.ask(1, confirms=before)
        until(lambda before=before: (turn(), len(stalled.got) > before)[-1])
    until(lambda: (turn(), stalled.echoes[:2] == [1, 2])[-1])


def test_many_that_stall_hold_up_the_others_for_a_while_only(
    serving: Serving, asker: Callable[[str], Asker], clock: Clock, until: Callable[..., Any]
) -> None:
    stalled = [asker(f"stalled-{index}") for index in range(9)]
    for each in stalled:
        each.ask(20)

    def total() -> float:
        serving.step(0.01)
        return serving.gauges()["flight_bytes"]

    until(lambda: total() == 8000)  # four of half the total, then one each for those with nothing
    late = asker("late")
    late.ask(1)
    until(lambda: (serving.step(0.01), late.read(), late.echoes == [1])[-1])
    assert late.got == []
    clock.now += STALLED_S
    until(lambda: (serving.step(0.01), late.read(), late.got == [1])[-1])
    assert serving.gauges()["flight_bytes"] <= 8000


def test_requests_that_nobody_has_room_for_are_dropped(
    serving: Serving, asker: Callable[[str], Asker], until: Callable[..., Any]
) -> None:
    greedy = asker("greedy")
    greedy.ask(2 * MAX_ASKED)
    until(lambda: (serving.step(0.01), serving.gauges()["unsent"] > 0)[-1])


def test_a_request_before_hello_is_dropped(
    serving: Serving, server: PublisherSocket, raw_dealer: Callable[..., Any], until: Callable[..., Any]
) -> None:
    dealer = raw_dealer(server.admit("generator-0"))
    dealer.send(messages.encode(GetBucket(version=Version(1, 1), index=0)))
    until(lambda: (serving.step(0.05), serving.gauges()["unsent"] == 1)[-1])
    assert receivers(serving) == (0, 0)
