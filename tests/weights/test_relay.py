"""Receivers that take versions from each other. Real sockets; every receiver has a thread that follows, as a generator has."""

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from asyncrl.models.memory import FlatTensors
from asyncrl.types import Version
from asyncrl.weights import route as routing
from asyncrl.weights.messages import Hello, encode
from asyncrl.weights.relay import WeightRelay

BUCKETS = 64
SIZE = BUCKETS * 4096 // 4  # floats, of buckets of 4 KiB
FOLLOWER = """
import sys, msgspec
from asyncrl.weights.relay import WeightRelay
from asyncrl.weights.sockets import Address
from asyncrl.weights.subscriber import WeightSubscriber

address = msgspec.json.decode(sys.stdin.readline(), type=Address)
relay = WeightRelay("127.0.0.1", shares_memory=False)
held, subscriber = None, WeightSubscriber(lambda: address, name=sys.argv[1], transport="tcp", poll_s=0.05, relay=relay)
print("up", flush=True)
while True:
    if (found := subscriber.next(held, 10.0)) is not None:
        held = found[0]
        print(held.update, flush=True)
"""


def numbered(update: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(SIZE, dtype=torch.float32) + update}


class Follower:
    """A receiver, what it has got, and who else may take it from it."""

    def __init__(self, bus: Any, publisher: Any, name: str, *, transport: str = "tcp", **kwargs: Any) -> None:
        self.relay = WeightRelay("127.0.0.1", shares_memory=transport == "auto")
        self.subscriber = bus.subscriber(publisher, name=name, transport=transport, relay=self.relay, credit=4, **kwargs)
        self.seen: list[tuple[Version, FlatTensors]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._ended.is_set():
            self.goes_on.wait()
            found = self.subscriber.next(self.seen[-1][0] if self.seen else None, 0.05)
            if found is not None:
                self.seen.append(found)

    def holds(self, update: int) -> bool:
        return bool(self.seen) and self.seen[-1][0].update == update

    @property
    def source(self) -> str | None:
        """The endpoint of the receiver that it takes versions from."""
        source = self.subscriber._route._source
        return source.endpoint if source else None

    def end(self) -> None:
        self.goes_on.set()
        self._ended.set()
        self._thread.join(30)


@pytest.fixture
def until(until: Callable) -> Callable[..., Any]:
    """Leaves the processor to the receivers between two looks."""
    pause = threading.Event()
    return lambda attempt: until(lambda: attempt() or pause.wait(0.01))


@pytest.fixture
def follow(bus: Any) -> Iterator[Callable[..., Follower]]:
    made: list[Follower] = []

    def make(publisher: Any, name: str, **kwargs: Any) -> Follower:
        made.append(Follower(bus, publisher, name, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.end()


def in_order(publisher: Any, follow: Callable, until: Callable, count: int, **kwargs: Any) -> list[Follower]:
    """Receivers that the publisher knows in this order."""
    found = []
    for number in range(count):
        found.append(follow(publisher, f"r{number}", **kwargs))
        until(lambda number=number: len(publisher._serving._tree._nodes) == number + 1)
    return found


def settled(followers: list[Follower], parents: list[int | None], until: Callable) -> None:
    ways = [None if parent is None else followers[parent].relay.source.endpoint for parent in parents]
    until(lambda: [each.source for each in followers] == ways)


def test_versions_pass_down_a_tree_to_the_bit_and_the_publisher_sends_few(
    bus: Any, follow: Callable, until: Callable, same: Callable
) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=2)
    followers = in_order(publisher, follow, until, 8)
    settled(followers, [None, None, 0, 0, 1, 1, 2, 2], until)
    for update in range(3):
        publisher.publish(Version(1, update), numbered(update))
        until(lambda update=update: all(each.holds(update) for each in followers))
    for each in followers:
        assert all(same(tensors, numbered(version.update)) for version, tensors in each.seen)
        assert each.subscriber.gauges()["received_bytes"] == 3 * SIZE * 4
        assert each.subscriber.gauges()["bad_transfers"] == 0
    assert publisher.gauges()["sent_bytes"] == 2 * 3 * SIZE * 4
    assert [each.subscriber.gauges()["relayed_versions"] for each in followers] == [0, 0, 3, 3, 3, 3, 3, 3]
    assert publisher.gauges()["receivers"] == 8  # it hears all of them


def test_who_shares_a_node_takes_versions_from_its_memory(bus: Any, follow: Callable, until: Callable, same: Callable) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)
    followers = in_order(publisher, follow, until, 3, transport="auto")
    settled(followers, [None, 0, 0], until)
    for update in range(3):
        publisher.publish(Version(1, update), numbered(update))
        until(lambda update=update: all(each.holds(update) for each in followers))
    assert all(same(tensors, numbered(version.update)) for each in followers for version, tensors in each.seen)
    assert publisher.gauges()["sent_bytes"] == 3 * SIZE * 4
    assert [each.subscriber.gauges()["shared_versions"] for each in followers] == [0, 3, 3]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], threading.Event]:
    """gate(publisher, n): it serves no bucket from number n on until the event is set."""

    def make(publisher: Any, first: int) -> threading.Event:
        opened, serving = threading.Event(), publisher._serving
        may_answer = serving._may_answer

        def may(identity: bytes, request: Any) -> bool:
            return (opened.is_set() or getattr(request, "index", 0) < first) and may_answer(identity, request)

        monkeypatch.setattr(serving, "_may_answer", may)
        return opened

    return make


def received(follower: Follower) -> int:
    return int(follower.subscriber.gauges()["received_bytes"])


def test_a_version_is_passed_on_while_it_still_comes(
    bus: Any, follow: Callable, until: Callable, same: Callable, gate: Callable
) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)
    followers = in_order(publisher, follow, until, 3)
    settled(followers, [None, 0, 1], until)
    opened = gate(publisher, BUCKETS // 2)
    publisher.publish(Version(1, 0), numbered(0))
    until(lambda: received(followers[2]) == SIZE * 4 // 2)
    assert not followers[0].seen
    opened.set()
    until(lambda: all(each.holds(0) for each in followers))
    assert same(followers[2].seen[0][1], numbered(0))
    assert publisher.gauges()["sent_bytes"] == SIZE * 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_relay_that_is_killed_or_stopped_in_the_middle_is_passed_by(
    bus: Any, follow: Callable, until: Callable, same: Callable, gate: Callable, how: signal.Signals
) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)
    first = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, "first"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert first.stdin is not None
        first.stdin.write(msgspec.json.encode(publisher.admit("first")) + b"\n")
        first.stdin.flush()
        assert first.stdout is not None
        assert first.stdout.readline() == b"up\n"
        until(lambda: "first" in publisher._serving._tree._nodes)
        far = follow(publisher, "far")
        until(lambda: far.source is not None)
        opened = gate(publisher, BUCKETS // 2)
        publisher.publish(Version(1, 0), numbered(0))
        until(lambda: received(far) == SIZE * 4 // 2)
        first.send_signal(how)
        opened.set()
        until(lambda: far.holds(0))
        assert same(far.seen[0][1], numbered(0))
        assert received(far) == SIZE * 4  # what was here stayed
        publisher.publish(Version(1, 1), numbered(1))
        until(lambda: far.holds(1))
    finally:
        first.kill()
        first.communicate(timeout=30)


def test_a_relay_that_does_not_follow_is_passed_by(
    bus: Any, follow: Callable, until: Callable, same: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)
    followers = in_order(publisher, follow, until, 2)
    settled(followers, [None, 0], until)
    publisher.publish(Version(1, 0), numbered(0))
    until(lambda: all(each.holds(0) for each in followers))
    monkeypatch.setattr(routing, "IDLE_S", 0.5)
    followers[0].goes_on.clear()  # its engine takes weights, for long
    publisher.publish(Version(1, 1), numbered(1))
    until(lambda: followers[1].holds(1))
    assert same(followers[1].seen[-1][1], numbered(1))
    assert followers[1].source is None


def test_a_receiver_waits_for_the_one_of_its_node_as_long_as_more_comes(
    bus: Any, follow: Callable, until: Callable, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "IDLE_S", 1.5)
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)
    followers = in_order(publisher, follow, until, 2, transport="auto")
    settled(followers, [None, 0], until)
    gates = [gate(publisher, count) for count in range(BUCKETS, 0, -BUCKETS // 8)]
    publisher.publish(Version(1, 0), numbered(0))
    for number in range(1, 9):
        until(lambda number=number: received(followers[0]) == SIZE * 4 * number // 8)
        threading.Event().wait(0.25)  # eight times this is longer than IDLE_S
        gates.pop().set()
    until(lambda: all(each.holds(0) for each in followers))
    assert followers[1].subscriber.gauges()["shared_versions"] == 1
    assert publisher.gauges()["sent_bytes"] == SIZE * 4


def test_what_a_relay_gives_up_its_guests_give_up(
    bus: Any, follow: Callable, until: Callable, same: Callable, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncrl.weights.subscriber.MAX_FAILURES", 1000)
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)
    followers = in_order(publisher, follow, until, 2)
    settled(followers, [None, 0], until)
    opened = gate(publisher, BUCKETS // 2)
    publisher.publish(Version(1, 0), numbered(0))
    until(lambda: received(followers[1]) == SIZE * 4 // 2)
    checksums = publisher._serving._versions.newest.forms[None].checksums
    checksums[BUCKETS // 2] = 0
    opened.set()
    until(lambda: followers[0].subscriber.gauges()["bad_transfers"] >= 1)
    del checksums[BUCKETS // 2]
    until(lambda: all(each.holds(0) for each in followers))
    assert all(same(each.seen[0][1], numbered(0)) for each in followers)
    assert followers[1].subscriber.gauges()["bad_transfers"] == 0


def test_deltas_are_passed_on(bus: Any, follow: Callable, until: Callable, same: Callable) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1, codec="delta")
    followers = in_order(publisher, follow, until, 2, codec="delta")
    settled(followers, [None, 0], until)
    tensors = numbered(0)
    for update in range(4):
        tensors["w"][update] += 1
        publisher.publish(Version(1, update), tensors)
        until(lambda update=update: all(each.holds(update) for each in followers))
        assert all(same(each.seen[-1][1], tensors) for each in followers)
    assert [each.subscriber.gauges()["delta_versions"] for each in followers] == [3, 3]
    assert followers[1].subscriber.gauges()["relayed_versions"] == 4
    assert received(followers[1]) == received(followers[0]) < 1.1 * SIZE * 4
    late = follow(publisher, "late", codec="delta")
    until(lambda: late.holds(3))
    assert same(late.seen[0][1], tensors)
    assert late.source == followers[1].relay.source.endpoint


def test_only_guests_are_served_and_who_left_is_none(bus: Any, follow: Callable, until: Callable, raw_dealer: Callable) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)
    followers = in_order(publisher, follow, until, 2)
    settled(followers, [None, 0], until)
    publisher.publish(Version(1, 0), numbered(0))
    until(lambda: all(each.holds(0) for each in followers))
    served = followers[0].relay._socket
    guest = publisher.admit("r1").client_public
    assert served._valid == {guest: "r1"}
    relay = followers[0].relay.source
    known = publisher.admit("r9")  # a receiver of the run, but no guest here
    dealer = raw_dealer(replace(known, endpoint=relay.endpoint, server_key=relay.server_key))
    dealer.send(encode(Hello(sequence=1)))
    assert not dealer.poll(500)
    followers[1].end()
    followers[1].subscriber.close()
    until(lambda: not served._valid)


def test_a_successor_of_the_publisher_is_followed_by_all(bus: Any, follow: Callable, until: Callable, same: Callable) -> None:
    publishers = [bus.publisher(transport="tcp", bucket_bytes=4096, fanout=1)]
    followers = [Follower(bus, publishers[0], f"r{i}", resolve=lambda i=i: publishers[-1].admit(f"r{i}")) for i in range(3)]
    try:
        publishers[0].publish(Version(1, 0), numbered(0))
        until(lambda: all(each.holds(0) for each in followers))
        publishers.append(bus.publisher(2, transport="tcp", bucket_bytes=4096, fanout=1))
        publishers[0].close()
        publishers[1].publish(Version(2, 1), numbered(1))
        until(lambda: all(each.seen[-1][0] == Version(2, 1) for each in followers))
        assert all(same(each.seen[-1][1], numbered(1)) for each in followers)
        until(lambda: sum(each.source is None for each in followers) == 1)
    finally:
        for each in followers:
            each.end()


@pytest.mark.slow
def test_whoever_comes_and_goes_all_that_stay_get_the_newest(
    bus: Any, follow: Callable, until: Callable, same: Callable
) -> None:
    publisher, chance = bus.publisher(transport="tcp", bucket_bytes=4096, fanout=2), random.Random(0)
    there: list[Follower] = []
    for update in range(40):
        publisher.publish(Version(1, update), numbered(update))
        if len(there) < 4 or (len(there) < 9 and chance.random() < 0.6):
            there.append(follow(publisher, f"r{update}"))
        else:
            gone = there.pop(chance.randrange(len(there)))
            gone.end()
            if chance.random() < 0.5:
                gone.relay.close()  # before it says goodbye to anybody
            gone.subscriber.close()
        if update % 4 == 3:
            until(lambda update=update: all(each.holds(update) for each in there))
    assert all(same(tensors, numbered(version.update)) for each in there for version, tensors in each.seen)
    assert all(each.subscriber.gauges()["bad_transfers"] == 0 for each in there)
    assert sum(each.subscriber.gauges()["relayed_versions"] for each in there) > 0
