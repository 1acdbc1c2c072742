"""Real sockets on 127.0.0.1, and a publisher that a test plays by hand."""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from asyncrl.models.memory import FlatTensors
from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.messages import Announce, Bucket, GetBucket, GetManifest, Hello, Manifest, Reply, Request
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.sockets import PublisherSocket
from asyncrl.weights.subscriber import WeightSubscriber

DEADLINE_S = 20.0


class HandPublisher:
    """Speaks the publisher's side of the protocol, but answers only what the test lets it answer."""

    def __init__(self, incarnation: int = 1) -> None:
        self._server = PublisherSocket("127.0.0.1", incarnation)
        self.admit = self._server.admit
        self.peer = b""
        self.seen: list[Request] = []

    def requests(self) -> list[Request]:
        """What came in since the last call."""
        found: list[Request] = []
        while self._server.socket.poll(0):
            self.peer, body = self._server.socket.recv_multipart()
            found.append(messages.decode_request(body))
        self.seen += found
        return found

    def send(self, reply: Reply, payload: bytes | None = None) -> None:
        self._server.socket.send_multipart([self.peer, messages.encode(reply), *([] if payload is None else [payload])])

    def send_raw(self, *frames: bytes) -> None:
        self._server.socket.send_multipart([self.peer, *frames])

    def answer(self, data: bytes, manifest: Manifest, buckets: Callable[[int], bytes | None] | None = None) -> None:
        """Answers all requests that are there. `buckets(index)` replaces a bucket's bytes; None drops the answer."""
        for request in self.requests():
            match request:
                case Hello(sequence=sequence):
                    self.send(Announce(version=manifest.version, echo=sequence))
                case GetManifest():
                    self.send(manifest)
                case GetBucket(index=index):
                    whole = data[manifest.bucket(index)]
                    payload = whole if buckets is None else buckets(index)
                    if payload is not None:
                        checksum = manifest.checksum(index, memoryview(whole))
                        self.send(Bucket(version=manifest.version, index=index, checksum=checksum), payload)

    def close(self) -> None:
        self._server.close()


class Bus:
    """Makes ends of the bus that are closed with the test."""

    def __init__(self) -> None:
        self._made: list[Any] = []

    def publisher(self, incarnation: int = 1, **kwargs: Any) -> WeightPublisher:
        made = WeightPublisher(incarnation, **{"bucket_bytes": 1000} | kwargs)
        self._made.append(made)
        return made

    def hand_publisher(self, incarnation: int = 1) -> HandPublisher:
        self._made.append(HandPublisher(incarnation))
        return self._made[-1]

    def subscriber(self, *publishers: Any, **kwargs: Any) -> WeightSubscriber:
        """Finds the last of `publishers`; or pass `resolve=`."""
        name = kwargs.pop("name", "generator-0")
        resolve = kwargs.pop("resolve", lambda: publishers[-1].admit(name))
        made = WeightSubscriber(resolve, name=name, **{"poll_s": 0.05, "deadline_s": DEADLINE_S} | kwargs)
        self._made.append(made)
        return made

    def close(self) -> None:
        for made in reversed(self._made):
            made.close()


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = Bus()
    yield made
    made.close()


@pytest.fixture
def until() -> Callable[..., Any]:
    """until(f): calls f, which itself waits or polls, until it returns something true; fails at a deadline."""

    def run(attempt: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while not (result := attempt()):
            assert time.monotonic() < deadline, "nothing happened before the deadline"
        return result

    return run


@pytest.fixture
def memories() -> Callable[[], int]:
    """Counts the versions that this process has open."""

    def count() -> int:
        gc.collect()
        found = set()
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # closed meanwhile: the one that lists them
                if "asyncrl-weights" in os.readlink(entry):
                    found.add(entry.stat().st_ino)
        return len(found)

    return count


@pytest.fixture
def weights() -> Callable[[int], dict[str, torch.Tensor]]:
    """weights(k): 20,034 bytes (with padding) that differ for each k; with a tied, a scalar and an empty tensor."""

    def make(k: int) -> dict[str, torch.Tensor]:
        matrix = torch.arange(5000, dtype=torch.float32).reshape(50, 100) + k
        return {"embed": matrix, "scale": torch.tensor(k, dtype=torch.bfloat16), "none": torch.empty(0, 3), "head": matrix}

    return make


@pytest.fixture
def packed() -> Callable[..., tuple[bytes, Manifest]]:
    """packed(version, tensors, bucket_bytes): the flat bytes and their manifest, as a publisher would make them."""

    def make(version: Version, tensors: dict[str, torch.Tensor], bucket_bytes: int = 1000) -> tuple[bytes, Manifest]:
        copied = FlatTensors.copy_of(tensors, "weights")
        data, total = bytes(copied.memory.bytes), copied.memory.nbytes
        manifest = Manifest(version=version, tensors=copied.specs, total_bytes=total, bucket_bytes=bucket_bytes)
        return data, manifest.signed()

    return make


@pytest.fixture
def same() -> Callable[..., bool]:
    def compare(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
        return left.keys() == right.keys() and all(
            left[n].shape == right[n].shape and left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
        )

    return compare


@pytest.fixture
def raw_dealer() -> Iterator[Callable[..., "zmq.Socket[bytes]"]]:
    """raw_dealer(address, public, secret): a bare client, to say what no subscriber would say."""
    context = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def make(address: Any, public: bytes | None = None, secret: bytes | None = None) -> "zmq.Socket[bytes]":
        sock = context.socket(zmq.DEALER)
        sock.curve_serverkey = address.server_key
        sock.curve_publickey = public or address.client_public
        sock.curve_secretkey = secret or address.client_secret
        sock.linger = 0
        sock.connect(address.endpoint)
        sockets.append(sock)
        return sock

    yield make
    for sock in sockets:
        sock.close()
    context.term()
