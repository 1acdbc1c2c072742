"""What a learner's process bears: receivers that stall, strangers that connect and say nothing. Real sockets."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq

from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.messages import GetBucket, Hello
from asyncrl.weights.sockets import Address

pytestmark = pytest.mark.slow

MIB = 1 << 20
LEARNER = """
import json, resource, sys
if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
import msgspec, torch
from asyncrl.types import Version
from asyncrl.weights.publisher import WeightPublisher

publisher = WeightPublisher(1, transport="tcp", bucket_bytes=1 << 20)
for line in sys.stdin:
    verb, *what = line.split()
    if verb == "admit":
        print(msgspec.json.encode(publisher.admit(*what)).decode(), flush=True)
        continue
    if what:
        publisher.publish(Version(1, int(what[0])), {"w": torch.full((2 << 20,), float(what[0]))})
    status = dict(entry.split(":") for entry in open("/proc/self/status").read().splitlines())
    memory = int(status["RssAnon"].split()[0]) << 10
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    print(json.dumps(publisher.gauges() | {"memory": memory, "limit": limit}), flush=True)
publisher.close()
"""


class LearnerProcess:
    """A publisher in a process of its own: what it holds can be measured."""

    def __init__(self, *limits: int) -> None:
        arguments = [sys.executable, "-c", LEARNER, *map(str, limits)]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def admit(self, name: str) -> Address:
        return msgspec.json.decode(self._answer(f"admit {name}"), type=Address)

    def publish(self, update: int | None = None) -> dict[str, Any]:
        """Publishes 8 MiB, or nothing; returns the publisher's gauges, its memory in bytes, and its limit of descriptors."""
        return json.loads(self._answer("publish" if update is None else f"publish {update}"))

    def _answer(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture
def learner() -> Iterator[Callable[..., LearnerProcess]]:
    made: list[LearnerProcess] = []

    def make(*limits: int) -> LearnerProcess:
        made.append(LearnerProcess(*limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_receivers_that_stall_cost_the_learner_little_memory_and_the_others_nothing(
    learner: Callable[..., LearnerProcess], bus: Any, until: Callable
) -> None:
    publisher = learner()
    before = publisher.publish(0)["memory"]
    healthy = bus.subscriber(publisher, transport="tcp")
    assert healthy.next(None, 20.0) is not None
    context = zmq.Context()
    context.rcvhwm = 1
    stalled = []
    for index in range(4):
        dealer, address = context.socket(zmq.DEALER), publisher.admit(f"stalled-{index}")
        dealer.curve_serverkey, dealer.linger = address.server_key, 0
        dealer.curve_publickey, dealer.curve_secretkey = address.client_public, address.client_secret
        dealer.connect(address.endpoint)
        dealer.send(messages.encode(Hello(sequence=1)))
        for number in range(120):
            dealer.send(messages.encode(GetBucket(version=Version(1, 0), index=number % 8)))
        stalled.append(dealer)

    def sent() -> float:
        return publisher.publish()["flight_bytes"]

    until(lambda: sent() >= 100 * MIB)
    for update in range(1, 5):
        found = None
        publisher.publish(update)
        while found is None:
            found = healthy.next(Version(1, update - 1), 20.0)
        assert found[0] == Version(1, update)
    figures = publisher.publish()
    assert figures["flight_bytes"] <= 256 * MIB
    assert figures["memory"] - before < 200 * MIB  # of 480 that they asked for
    assert figures["live_versions"] <= 3
    for dealer in stalled:
        dealer.close()
    context.term()


def test_strangers_that_say_nothing_do_not_use_up_the_descriptors(
    learner: Callable[..., LearnerProcess], bus: Any, until: Callable
) -> None:
    publisher = learner(256, 1024)
    assert publisher.publish(0)["limit"] == 1024  # it was raised as far as it may be
    receiver = bus.subscriber(publisher, transport="tcp")
    assert receiver.next(None, 20.0) is not None
    host, _, port = publisher.admit("generator-0").endpoint.removeprefix("tcp://").rpartition(":")
    strangers = []
    try:
        for number in range(2000):
            strangers.append(socket.create_connection((host, int(port)), timeout=20.0))
            if number % 400 == 399:
                update = number // 400 + 1
                figures = publisher.publish(update)
                assert figures["connections"] <= 512
                found = None
                while found is None:
                    found = receiver.next(Version(1, update - 1), 20.0)
                assert found[0] == Version(1, update)
        assert until(lambda: publisher.publish()["connections"] <= 256)
        assert publisher.publish()["connections_cut"] > 0
        assert receiver.gauges()["connections"] == 1
    finally:
        for stranger in strangers:
            stranger.close()
    late = bus.subscriber(publisher, transport="tcp", name="late")
    assert late.next(None, 20.0) is not None
