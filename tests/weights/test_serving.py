"""What the publisher makes of receivers that vanish, on a clock that the test moves."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncrl.weights import messages
from asyncrl.weights.messages import Bye, Hello
from asyncrl.weights.serving import PROBE_S, Serving
from asyncrl.weights.sockets import Server, Waker

HELLO = messages.encode(Hello(receiver="generator-7", sequence=1))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server("127.0.0.1", incarnation=1)
    yield made
    made.close()


@pytest.fixture
def serving(server: Server, clock: Clock) -> Iterator[Serving]:
    waker = Waker()
    yield Serving(server.socket, waker, threading.Condition(), clock)
    waker.close()


def receivers(serving: Serving) -> tuple[float, float]:
    serving.step(0.05)
    gauges = serving.gauges()
    return gauges["receivers"], gauges["receivers_lost"]


def test_a_dead_receiver_is_named_once_and_forgotten(
    serving: Serving,
    server: Server,
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
    serving: Serving, server: Server, raw_dealer: Callable[..., Any], until: Callable[..., Any]
) -> None:
    dealer = raw_dealer(server.address)
    dealer.send(HELLO)
    until(lambda: receivers(serving) == (1, 0))
    dealer.send(HELLO)
    dealer.send(messages.encode(Bye()))
    dealer.close(linger=5000)
    until(lambda: receivers(serving) == (0, 0))
