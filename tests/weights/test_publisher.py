import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zmq

from asyncrl.errors import Closed, ConfigError, Unavailable
from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.messages import Announce, Bucket, GetBucket, GetManifest, Gone, Hello, Manifest, Refused, Reply
from asyncrl.weights.serving import Live, Serving

HELLO = Hello(sequence=1)
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


class Watched(dict):
    """Tensors that tell while they are being staged how many versions lie in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor], count: Callable[[], int]) -> None:
        super().__init__(tensors)
        self._count, self.seen = count, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.seen = max(self.seen, self._count())
        return super().__getitem__(name)


def test_at_most_two_versions_are_live_also_while_staging(bus: Any, weights: Callable, memories: Callable[[], int]) -> None:
    publisher = bus.publisher()
    staged = []
    for update in range(6):
        tensors = Watched(weights(update), memories)
        publisher.publish(Version(1, update), tensors)
        staged.append(tensors.seen)
        assert memories() <= 2
        assert publisher.gauges()["live_versions"] <= 2
    assert staged == [1, 2, 2, 2, 2, 2]
    publisher.close()
    publisher.close()
    assert memories() == 0


def test_too_little_memory_stops_before_anything_is_written(bus: Any, weights: Callable, memories: Callable[[], int]) -> None:
    publisher = bus.publisher()
    with pytest.raises(ConfigError, match=r"weights 1\.1 need 18,014,398,509,482,048 bytes of memory.*more memory"):
        publisher.publish(Version(1, 1), {"a": torch.empty(1, device="meta").expand(1 << 52)})
    assert memories() == 0
    publisher.publish(Version(1, 1), weights(1))  # it is not the end


def test_versions_must_rise_within_the_incarnation(bus: Any, weights: Callable) -> None:
    publisher = bus.publisher(3)
    publisher.publish(Version(3, 5), weights(5))
    for wrong, why in ((Version(3, 5), "after 3.5"), (Version(3, 4), "after 3.5"), (Version(4, 6), "incarnation 3")):
        with pytest.raises(ValueError, match=why):
            publisher.publish(wrong, weights(1))


def test_after_close_nothing_is_published(bus: Any, weights: Callable, memories: Callable[[], int]) -> None:
    publisher = bus.publisher()
    publisher.close()
    with pytest.raises(Closed, match="closed"):
        publisher.publish(Version(1, 1), weights(1))
    assert memories() == 0


def test_a_failed_io_thread_is_told_to_the_learner(
    bus: Any, weights: Callable, memories: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(serving: Serving, live: Live, ready: bool) -> None:
        raise OSError("No such device")

    monkeypatch.setattr(Serving, "show", broken)
    publisher = bus.publisher()
    publisher.publish(Version(1, 1), weights(1))
    with pytest.raises(Unavailable, match=r"thread failed.*No such device"):
        publisher.publish(Version(1, 2), weights(2))  # waits for 1.1 to become visible
    with pytest.raises(Unavailable, match="No such device"):
        publisher.gauges()
    publisher.close()


def test_a_bad_peer_is_refused_and_counted_but_kills_nothing(bus: Any, weights: Callable, raw_dealer: Callable) -> None:
    publisher = bus.publisher()
    publisher.publish(Version(1, 1), weights(1))
    dealer = raw_dealer(publisher.admit("generator-0"))
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
    dealer = raw_dealer(publisher.admit("generator-0"))
    assert call(dealer, HELLO)[0] == Announce(version=None, echo=1)
    for update in (1, 2):
        publisher.publish(Version(1, update), weights(update))
        assert answer(dealer)[0] == Announce(version=Version(1, update), echo=0)


def test_a_receiver_that_leaves_is_not_missed(bus: Any, weights: Callable, until: Callable) -> None:
    publisher = bus.publisher()
    subscriber = bus.subscriber(publisher)
    until(lambda: subscriber.next(None, 0.05) is None and publisher.gauges()["receivers"] == 1)
    subscriber.close()
    until(lambda: publisher.gauges()["receivers"] == 0)
    publisher.publish(Version(1, 1), weights(1))
    assert publisher.gauges()["receivers_lost"] == 0


def test_publishing_while_closing_ends_cleanly(bus: Any, weights: Callable, memories: Callable[[], int]) -> None:
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
    assert memories() == 0


def test_versions_of_many_buckets_are_shown_one_by_one(bus: Any, raw_dealer: Callable) -> None:
    publisher = bus.publisher(transport="tcp", bucket_bytes=1 << 16)
    dealer = raw_dealer(publisher.admit("generator-0"))
    for update in (1, 2, 3):
        publisher.publish(Version(1, update), {"w": torch.full((1 << 18,), float(update))})
        manifest = visible(dealer, Version(1, update))
        assert manifest.bucket_count == 16  # 1 MiB in buckets of 64 KiB
        assert manifest.place is None
