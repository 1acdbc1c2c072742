import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from asyncrl.errors import Closed, ConfigError, Unavailable
from asyncrl.types import Version
from asyncrl.weights import messages, shm
from asyncrl.weights.messages import Announce, Bucket, GetBucket, GetManifest, Gone, Hello, Manifest, Refused, Reply
from asyncrl.weights.publisher import WeightPublisher

HELLO = Hello(receiver="generator-7", sequence=1)
HELLO_BYTES = messages.encode(HELLO)


def call(dealer: "zmq.Socket[bytes]", request: Any) -> tuple[Reply, bytes]:
    dealer.send(request if isinstance(request, bytes) else messages.encode(request))
    return answer(dealer)


def answer(dealer: "zmq.Socket[bytes]") -> tuple[Reply, bytes]:
    assert dealer.poll(20_000)
    body, *payload = dealer.recv_multipart()
    return messages.decode_reply(body), payload[0] if payload else b""


def visible(dealer: "zmq.Socket[bytes]", version: Version) -> Manifest:
    """Waits for the publisher's hint; returns the manifest."""
    hint = call(dealer, HELLO)[0]
    while isinstance(hint, Announce) and hint.version != version:
        hint = answer(dealer)[0]
    manifest, _ = call(dealer, GetManifest(version=version))
    while isinstance(manifest, Announce):
        manifest, _ = answer(dealer)
    assert isinstance(manifest, Manifest)
    return manifest


def test_publish_stages_a_copy(bus: Any, weights: Callable, same: Callable) -> None:
    for transport in ("auto", "tcp"):
        publisher = bus.publisher(transport=transport)
        tensors = weights(1)
        publisher.publish(Version(1, 1), tensors)
        tensors["embed"].zero_()  # training goes on
        found = bus.subscriber(publisher, transport=transport).next(None, 20.0)
        assert found is not None
        assert same(found[1], weights(1))


def test_at_most_two_versions_are_live_also_while_staging(bus: Any, weights: Callable) -> None:
    staged_beside = []

    def free(folder: Path) -> int:
        staged_beside.append(len(list(folder.iterdir())))
        return 1 << 40

    publisher = bus.publisher(free_bytes=free)
    for update in range(6):
        publisher.publish(Version(1, update), weights(update))
        assert len(list(bus.folder.iterdir())) <= 2
        assert publisher.gauges()["live_versions"] <= 2
    assert staged_beside == [0, 1, 1, 1, 1, 1]
    publisher.close()
    assert list(bus.folder.iterdir()) == []


def test_nothing_is_left_in_shared_memory(weights: Callable, tmp_path: Path) -> None:
    folder = shm.default_folder()
    run = str(tmp_path)
    publisher = WeightPublisher(run, 1)
    for update in range(3):
        publisher.publish(Version(1, update), weights(update))
    assert list(folder.glob(shm._prefix(run) + "*"))
    publisher.close()
    publisher.close()
    assert not list(folder.glob(shm._prefix(run) + "*"))


def test_low_space_stops_before_anything_is_written(bus: Any, weights: Callable) -> None:
    room = [100]
    publisher = bus.publisher(free_bytes=lambda folder: room[0])
    with pytest.raises(ConfigError, match=r"weights 1\.1 need 20,\d+ bytes in .* has 100 free"):
        publisher.publish(Version(1, 1), weights(1))
    assert list(bus.folder.iterdir()) == []
    room[0] = 1 << 30
    publisher.publish(Version(1, 1), weights(1))  # a full disk is not the end


def test_leftovers_of_a_dead_publisher_are_swept(bus: Any) -> None:
    left = shm.VersionFile(bus.folder, "run", Version(1, 1), 0)
    left.reveal()
    assert bus.publisher().gauges()["swept_files"] == 0  # it lives: it holds its lock
    path, kept = left.path, left.path.read_bytes()
    left.close()
    path.write_bytes(kept)
    assert bus.publisher(2).gauges()["swept_files"] == 1
    assert list(bus.folder.iterdir()) == []


def test_versions_must_rise_within_the_incarnation(bus: Any, weights: Callable) -> None:
    publisher = bus.publisher(3)
    publisher.publish(Version(3, 5), weights(5))
    for wrong, why in ((Version(3, 5), "after 3.5"), (Version(3, 4), "after 3.5"), (Version(4, 6), "incarnation 3")):
        with pytest.raises(ValueError, match=why):
            publisher.publish(wrong, weights(1))


def test_after_close_nothing_is_published(bus: Any, weights: Callable) -> None:
    publisher = bus.publisher()
    publisher.close()
    with pytest.raises(Closed, match="closed"):
        publisher.publish(Version(1, 1), weights(1))
    assert list(bus.folder.iterdir()) == []


class Cleaned(dict):
    """Tensors during whose staging somebody empties the folder."""

    folder: Path

    def __getitem__(self, name: str) -> torch.Tensor:
        for path in self.folder.iterdir():
            path.unlink()
        return super().__getitem__(name)


def test_a_failed_io_thread_is_told_to_the_learner(bus: Any, weights: Callable, until: Callable) -> None:
    publisher = bus.publisher()
    tensors = Cleaned(weights(1))
    tensors.folder = bus.folder
    publisher.publish(Version(1, 1), tensors)
    with pytest.raises(Unavailable, match=r"I/O thread failed.*No such file"):
        publisher.publish(Version(1, 2), weights(2))  # waits for 1.1 to become visible
    publisher.close()
    assert list(bus.folder.iterdir()) == []


def test_a_bad_peer_is_refused_and_counted_but_kills_nothing(bus: Any, weights: Callable, raw_dealer: Callable) -> None:
    publisher = bus.publisher()
    publisher.publish(Version(1, 1), weights(1))
    dealer = raw_dealer(publisher.address)
    visible(dealer, Version(1, 1))
    wrong = [b"", b"\xff" * 50, HELLO_BYTES[:-1], messages.encode({"type": "run", "code": "rm"}), b"\x80"]
    for body in wrong:
        assert isinstance(call(dealer, body)[0], Refused)
    dealer.send_multipart([HELLO_BYTES, b"more"])
    assert isinstance(answer(dealer)[0], Refused)
    for index in (-1, 21, 1 << 60):
        assert isinstance(call(dealer, GetBucket(version=Version(1, 1), index=index))[0], Refused)
    assert isinstance(call(dealer, GetBucket(version=Version(9, 9), index=0))[0], Gone)
    assert isinstance(call(dealer, GetManifest(version=Version(1, 2)))[0], Gone)
    header, payload = call(dealer, GetBucket(version=Version(1, 1), index=20))
    assert isinstance(header, Bucket)
    assert len(payload) == 34  # the matrix ends at 20,000, the scalar lies at 20,032 (a multiple of 64), 2 bytes long
    assert publisher.gauges()["bad_requests"] == len(wrong) + 1 + 3


def test_a_hint_comes_with_each_version_and_a_rising_sequence(bus: Any, weights: Callable, raw_dealer: Callable) -> None:
    publisher = bus.publisher()
    dealer = raw_dealer(publisher.address)
    assert call(dealer, HELLO)[0] == Announce(version=None, sequence=0, echo=1)
    for update in (1, 2):
        publisher.publish(Version(1, update), weights(update))
        assert answer(dealer)[0] == Announce(version=Version(1, update), sequence=update, echo=0)


def test_a_receiver_that_leaves_is_not_missed(bus: Any, weights: Callable, until: Callable) -> None:
    publisher = bus.publisher()
    subscriber = bus.subscriber(publisher)
    until(lambda: subscriber.next(None, 0.05) is None and publisher.gauges()["receivers"] == 1)
    subscriber.close()
    until(lambda: publisher.gauges()["receivers"] == 0)
    publisher.publish(Version(1, 1), weights(1))
    assert publisher.gauges()["receivers_lost"] == 0


def test_publishing_while_closing_ends_cleanly(bus: Any, weights: Callable) -> None:
    publisher = bus.publisher()
    outcome: list[str] = []
    started = threading.Event()

    def learner() -> None:
        for update in itertools.count():
            try:
                publisher.publish(Version(1, update), weights(update))
            except Closed:
                outcome.append("closed")
                return
            started.set()

    thread = threading.Thread(target=learner)
    thread.start()
    assert started.wait(20)
    publisher.close()
    thread.join(20)
    assert outcome == ["closed"]
    assert list(bus.folder.iterdir()) == []


def test_big_versions_are_served_while_the_next_is_sealed(bus: Any, raw_dealer: Callable) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=1 << 16)
    dealer = raw_dealer(publisher.address)
    for update in (1, 2, 3):
        publisher.publish(Version(1, update), {"w": torch.full((1 << 18,), float(update))})
        manifest = visible(dealer, Version(1, update))
        assert len(manifest.checksums) == 16  # 1 MiB in buckets of 64 KiB
        assert manifest.file is None
