import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq

from asyncrl.weights import messages
from asyncrl.weights.messages import Hello
from asyncrl.weights.sockets import Address, PublisherSocket, Waker

HELLO = messages.encode(Hello(receiver="g", sequence=1))


def test_only_the_runs_key_is_served(bus: Any, raw_dealer: Callable) -> None:
    address = bus.publisher().address
    stranger = raw_dealer(address, *zmq.curve_keypair())
    monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    stranger.send(HELLO)
    assert monitor.poll(20_000)  # refused by name, not just slow
    stranger.disable_monitor()
    monitor.close(0)
    assert not stranger.poll(0)
    friend = raw_dealer(address)
    friend.send(HELLO)
    assert friend.poll(20_000)
    assert not stranger.poll(0)


def test_every_publisher_has_its_own_keys_and_port(bus: Any) -> None:
    first, second = bus.publisher().address, bus.publisher().address
    assert first.endpoint != second.endpoint
    assert first.endpoint.startswith("tcp://127.0.0.1:")
    assert len({first.server_key, second.server_key, first.client_public, second.client_public}) == 4


def test_an_address_travels_and_does_not_print_its_keys(bus: Any) -> None:
    address = bus.publisher().address
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(address), type=Address) == address
    for text in (repr(address), str(address), str(list(address.__rich_repr__()))):
        assert address.client_secret.decode() not in text
        assert address.endpoint in text


def test_a_foreign_host_is_an_error_at_once() -> None:
    with pytest.raises(zmq.ZMQError):
        PublisherSocket("192.0.2.1", 1)


def test_waker_ends_a_poll_in_another_thread() -> None:
    waker, woken = Waker(), threading.Event()
    poller = zmq.Poller()
    poller.register(waker.fileno(), zmq.POLLIN)

    def wait() -> None:
        if poller.poll(20_000):
            woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    for _ in range(100_000):  # more than a socket buffer holds: `set` never blocks
        waker.set()
    assert woken.wait(20)
    thread.join(20)
    waker.clear()
    assert not poller.poll(0)
    waker.close()
