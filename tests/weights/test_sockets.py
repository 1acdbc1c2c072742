import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq

from asyncrl.errors import Fenced
from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.messages import Hello
from asyncrl.weights.sockets import Address, PublisherSocket, Waker

HELLO = messages.encode(Hello(sequence=1))


def test_only_the_runs_key_is_served(bus: Any, raw_dealer: Callable) -> None:
    address = bus.publisher().admit("generator-0")
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
    first, second = bus.publisher().admit("generator-0"), bus.publisher().admit("generator-0")
    assert first.endpoint != second.endpoint
    assert first.endpoint.startswith("tcp://127.0.0.1:")
    assert len({first.server_key, second.server_key, first.client_public, second.client_public}) == 4


def test_every_receiver_has_its_own_keys_until_they_are_void() -> None:
    server = PublisherSocket("127.0.0.1", 1)
    one, other = server.admit("generator-0"), server.admit("generator-1")
    assert server.admit("generator-0") == one
    assert len({one.client_public, other.client_public, one.client_secret, other.client_secret}) == 4
    assert (one.endpoint, one.server_key) == (other.endpoint, other.server_key)
    restarted = server.admit("generator-0", 1)
    assert [server.admits(address.client_public) for address in (one, other, restarted)] == [False, True, True]
    with pytest.raises(Fenced, match="generator-0: incarnation 0 was replaced by 1"):
        server.admit("generator-0", 0)
    server.void(restarted.client_public)
    server.void(restarted.client_public)
    server.void(b"nobody's")
    assert not server.admits(restarted.client_public)
    with pytest.raises(Fenced):
        server.admit("generator-0", 0)
    again = server.admit("generator-0", 1)
    assert again.client_public not in (one.client_public, restarted.client_public)
    assert server.admits(again.client_public)
    server.close()


def refused(dealer: Any) -> bool:
    """Whether a client that asks is refused by name."""
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    dealer.send(HELLO)
    try:
        return bool(monitor.poll(20_000))
    finally:
        dealer.disable_monitor()
        monitor.close(0)


def test_a_receiver_that_was_removed_is_refused_and_no_other_notices(
    bus: Any, raw_dealer: Callable, weights: Callable, same: Callable
) -> None:
    publisher = bus.publisher(transport="tcp")
    address = publisher.admit("generator-1")
    publisher.publish(Version(1, 1), weights(1))
    gone = bus.subscriber(publisher, transport="tcp", name="generator-1")
    stays = bus.subscriber(publisher, transport="tcp", name="generator-0")
    assert gone.next(None, 20.0) is not None
    assert stays.next(None, 20.0) is not None
    gone.close()  # says goodbye
    assert refused(raw_dealer(address))
    publisher.publish(Version(1, 2), weights(2))
    version, tensors = stays.next(Version(1, 1), 20.0)
    assert version == Version(1, 2)
    assert same(tensors, weights(2))
    joins = bus.subscriber(publisher, transport="tcp", name="generator-1")  # a new one under the name
    assert joins.next(None, 20.0) is not None
    assert publisher.admit("generator-1").client_public != address.client_public


def test_a_replaced_receiver_is_served_no_more_on_the_connection_that_it_has(
    bus: Any, raw_dealer: Callable, until: Callable
) -> None:
    publisher = bus.publisher()
    zombie = raw_dealer(publisher.admit("generator-0", 1))
    zombie.send(HELLO)
    assert zombie.poll(20_000)
    zombie.recv_multipart()
    successor = raw_dealer(publisher.admit("generator-0", 2))
    zombie.send(HELLO)
    successor.send(HELLO)
    assert successor.poll(20_000)
    assert not zombie.poll(100)


def test_a_receiver_whose_key_is_void_comes_back_with_another(bus: Any, weights: Callable, same: Callable) -> None:
    """As when it was out of reach for so long that it was taken for lost."""
    publisher = bus.publisher(transport="tcp")
    subscriber = bus.subscriber(publisher, transport="tcp")
    publisher.publish(Version(1, 1), weights(1))
    assert subscriber.next(None, 20.0) is not None
    publisher._socket.void(publisher.admit("generator-0").client_public)
    publisher.publish(Version(1, 2), weights(2))
    found = subscriber.next(Version(1, 1), 20.0)
    assert found is not None
    assert same(found[1], weights(2))
    assert subscriber.gauges()["connections"] == 2


def test_other_keys_are_no_other_publisher() -> None:
    servers = [PublisherSocket("127.0.0.1", incarnation) for incarnation in (1, 1)]
    one, elsewhere = (server.admit("generator-0") for server in servers)
    servers[0].void(one.client_public)
    again = servers[0].admit("generator-0")
    assert again != one
    assert again.same_publisher(one)
    assert not elsewhere.same_publisher(one)
    assert not msgspec.structs.replace(one, incarnation=2).same_publisher(one)
    assert not msgspec.structs.replace(one, endpoint=elsewhere.endpoint).same_publisher(one)
    assert not msgspec.structs.replace(one, server_key=elsewhere.server_key).same_publisher(one)
    for server in servers:
        server.close()


def test_a_version_half_here_outlives_the_key(bus: Any, weights: Callable, same: Callable, until: Callable) -> None:
    publisher = bus.publisher(transport="tcp")
    subscriber = bus.subscriber(publisher, transport="tcp", credit=1)
    publisher.publish(Version(1, 1), weights(1))
    until(lambda: subscriber.next(None, 0.0) is None and subscriber.gauges()["received_bytes"] > 5000)
    publisher._socket.void(publisher.admit("generator-0").client_public)
    found = subscriber.next(None, 20.0)
    assert found is not None
    assert same(found[1], weights(1))
    assert subscriber.gauges()["connections"] == 2
    nbytes = publisher.gauges()["staged_bytes"]
    assert nbytes <= subscriber.gauges()["received_bytes"] <= nbytes + 1000


def test_an_address_travels_and_does_not_print_its_keys(bus: Any) -> None:
    address = bus.publisher().admit("generator-0")
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
