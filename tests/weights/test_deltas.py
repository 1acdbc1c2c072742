"""Deltas on the bus: whatever is lost, damaged or skipped, a receiver shows nothing but a version that was published."""

import random
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from asyncrl.errors import BadTransfer, ConfigError
from asyncrl.models.loading import load_weights
from asyncrl.models.memory import FlatTensors, WeightMemory
from asyncrl.types import Version
from asyncrl.weights import assembly as assembling
from asyncrl.weights import publisher as publishing
from asyncrl.weights.delta import encode_delta
from asyncrl.weights.messages import Announce, Bucket, GetBucket, GetManifest, Hello, Manifest
from asyncrl.weights.versions import Live, VersionDelta

WAIT_S = 20.0
SIZE = 50_000  # 100,000 bytes


class Training:
    """Weights of which a few elements change with every update."""

    def __init__(self, share: float = 0.01) -> None:
        self._generator, self._share = torch.Generator().manual_seed(7), share
        self.made = [{"w": torch.randn(SIZE, generator=self._generator).bfloat16(), "norm": torch.ones(100)}]

    def __getitem__(self, update: int) -> dict[str, torch.Tensor]:
        while len(self.made) <= update:
            new = {name: tensor.clone() for name, tensor in self.made[-1].items()}
            new["w"].view(torch.int16)[torch.rand(SIZE, generator=self._generator) < self._share] ^= 1
            self.made.append(new)
        return self.made[update]


@pytest.fixture
def ends(bus: Any) -> Callable[..., tuple[Any, Any]]:
    """A publisher and a receiver over TCP, which has said hello."""

    def make(**kwargs: Any) -> tuple[Any, Any]:
        publisher = bus.publisher(transport="tcp", codec="delta", **kwargs)
        return publisher, bus.subscriber(publisher, transport="tcp", codec="delta")

    return make


def publish_and_wait(publisher: Any, until: Callable, update: int, tensors: dict[str, torch.Tensor]) -> None:
    """Until receivers over the socket can see it: an impatient learner gets no deltas."""
    publisher.publish(Version(1, update), tensors)
    until(lambda: not publisher._pending)


def holdings(publisher: Any) -> list[Version | None]:
    """What every receiver has told that it holds."""
    with publisher._changed:
        return [receiver.holds for receiver in publisher._serving._receivers()]


def take(subscriber: Any, held: Version | None, version: Version) -> FlatTensors:
    """The version, and no earlier one."""
    found = subscriber.next(held, WAIT_S)
    while found is not None and found[0] != version:
        found = subscriber.next(found[0], WAIT_S)
    assert found is not None
    return found[1]


def test_thirty_versions_are_equal_to_the_bit_and_every_tenth_travels_whole(ends: Callable, same: Callable) -> None:
    publisher, subscriber = ends(anchor_freq=10)
    training, held, sent = Training(), None, [0.0]
    for update in range(30):
        version = Version(1, update)
        publisher.publish(version, training[update])
        assert same(take(subscriber, held, version), training[update])
        held = version
        sent.append(publisher.gauges()["sent_bytes"])
    whole = publisher.gauges()["staged_bytes"]
    each = [after - before for before, after in pairwise(sent)]
    assert [update for update, nbytes in enumerate(each) if nbytes == whole] == [0, 10, 20]
    assert all(nbytes < 0.02 * whole for update, nbytes in enumerate(each) if update % 10)
    assert subscriber.gauges()["delta_versions"] == 27
    assert subscriber.gauges()["bad_transfers"] == 0
    assert subscriber.gauges()["received_bytes"] == sent[-1]


def test_who_missed_versions_gets_all_that_changed_since_and_who_is_new_a_whole_one(
    bus: Any, ends: Callable, same: Callable, until: Callable
) -> None:
    publisher, subscriber = ends()
    training = Training()
    publisher.publish(Version(1, 0), training[0])
    take(subscriber, None, Version(1, 0))
    before = publisher.gauges()["sent_bytes"]
    for update in range(1, 6):
        publish_and_wait(publisher, until, update, training[update])
    late = bus.subscriber(publisher, transport="tcp", codec="delta", name="late")
    held = subscriber.next(Version(1, 0), WAIT_S)
    assert held is not None
    assert same(held[1], training[held[0].update])
    if held[0].update < 5:  # the last was not visible yet
        assert same(take(subscriber, held[0], Version(1, 5)), training[5])
    nbytes = publisher.gauges()["sent_bytes"] - before
    assert 0 < nbytes < 5 * 0.02 * publisher.gauges()["staged_bytes"]
    assert same(take(late, None, Version(1, 5)), training[5])
    assert late.gauges()["received_bytes"] == publisher.gauges()["staged_bytes"]
    assert late.gauges()["delta_versions"] == 0


def test_deltas_are_kept_while_they_are_less_than_a_version(ends: Callable, same: Callable, until: Callable) -> None:
    publisher, subscriber = ends(anchor_freq=1000)
    training = Training(0.15)
    publisher.publish(Version(1, 0), training[0])
    take(subscriber, None, Version(1, 0))
    for update in range(1, 20):  # 3 bytes for 0.15 of all elements of 2
        publish_and_wait(publisher, until, update, training[update])
    assert same(take(subscriber, Version(1, 0), Version(1, 19)), training[19])
    assert subscriber.gauges()["delta_versions"] <= 1  # of one that was not the last
    assert subscriber.gauges()["received_bytes"] <= 2.3 * publisher.gauges()["staged_bytes"]


def test_what_changed_in_all_or_in_shape_travels_whole(ends: Callable, same: Callable) -> None:
    publisher, subscriber = ends()
    versions = [{"w": torch.full((20_000,), float(k))} for k in range(3)] + [
        {"w": torch.zeros(30_000)},
        {"v": torch.zeros(30_000)},
    ]
    held = None
    for update, tensors in enumerate(versions):
        publisher.publish(Version(1, update), tensors)
        assert same(take(subscriber, held, Version(1, update)), tensors)
        held = Version(1, update)
    assert subscriber.gauges()["delta_versions"] == 0
    assert publisher.gauges()["delta_bytes"] == 0


def test_another_incarnation_begins_with_a_whole_one(bus: Any, same: Callable) -> None:
    publishers = [bus.publisher(1, transport="tcp", codec="delta")]
    subscriber = bus.subscriber(resolve=lambda: publishers[-1].admit("generator-0"), transport="tcp", codec="delta")
    training, other = Training(), Training()
    for update in range(2):
        publishers[0].publish(Version(1, update), training[update])
        take(subscriber, Version(1, update - 1) if update else None, Version(1, update))
    publishers.append(bus.publisher(2, transport="tcp", codec="delta"))
    other.made[0]["norm"] = torch.zeros(100)  # a checkpoint of before
    for update in range(2):
        publishers[1].publish(Version(2, update), other[update])
        assert same(take(subscriber, Version(2, update - 1) if update else Version(1, 1), Version(2, update)), other[update])
    assert subscriber.gauges()["delta_versions"] == 2
    assert subscriber.gauges()["bad_transfers"] == 0


@pytest.mark.parametrize(("of_publisher", "of_subscriber"), [("full", "delta"), ("delta", "full")])
def test_one_end_alone_sends_no_deltas(bus: Any, same: Callable, of_publisher: str, of_subscriber: str) -> None:
    publisher = bus.publisher(transport="tcp", codec=of_publisher)
    subscriber = bus.subscriber(publisher, transport="tcp", codec=of_subscriber)
    training = Training()
    for update in range(3):
        publisher.publish(Version(1, update), training[update])
        assert same(take(subscriber, Version(1, update - 1) if update else None, Version(1, update)), training[update])
    assert subscriber.gauges()["received_bytes"] == 3 * publisher.gauges()["staged_bytes"]


def test_within_a_node_no_delta_is_made(bus: Any, same: Callable) -> None:
    publisher = bus.publisher(codec="delta")
    subscriber = bus.subscriber(publisher, codec="delta")
    training = Training()
    for update in range(3):
        publisher.publish(Version(1, update), training[update])
        assert same(take(subscriber, Version(1, update - 1) if update else None, Version(1, update)), training[update])
    assert subscriber.gauges()["shared_versions"] == 3
    assert publisher.gauges()["delta_s"] == 0


def test_where_there_is_no_room_for_a_base_versions_come_whole(
    ends: Callable, same: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publisher, subscriber = ends()
    taken, create = weakref.WeakSet[WeightMemory](), WeightMemory.create

    def with_little_room(nbytes: int, what: str) -> WeightMemory:
        if sum(memory.nbytes for memory in taken) + nbytes > 1.5 * 2 * SIZE:
            raise ConfigError(f"{what} need more")
        taken.add(memory := create(nbytes, what))
        return memory

    monkeypatch.setattr(assembling, "WeightMemory", SimpleNamespace(create=with_little_room))
    training = Training()
    for update in range(4):
        publisher.publish(Version(1, update), training[update])
        right = same(take(subscriber, Version(1, update - 1) if update else None, Version(1, update)), training[update])
        assert right  # on a line of its own: pytest keeps what an assertion uses
    assert subscriber.gauges()["delta_versions"] == 0
    assert [record.name for record in caplog.records] == ["asyncrl.weights.subscriber"]


def test_a_model_that_writes_to_its_weights_spoils_no_base(ends: Callable, same: Callable) -> None:
    publisher, subscriber = ends()
    training, held = Training(), None
    model = torch.nn.ParameterDict({"w": torch.zeros(SIZE, dtype=torch.bfloat16), "norm": torch.zeros(100)})
    for update in range(3):
        publisher.publish(Version(1, update), training[update])
        tensors = take(subscriber, held, Version(1, update))
        assert same(tensors, training[update])
        load_weights(model, tensors)
        assert model["w"].data_ptr() == tensors["w"].data_ptr()
        model["w"].data.zero_()
        held = Version(1, update)
    assert subscriber.gauges()["delta_versions"] == 2
    assert subscriber.gauges()["bad_transfers"] == 0


def test_memory_is_that_of_two_versions_at_either_end(ends: Callable, memories: Callable[[], int]) -> None:
    publisher, subscriber = ends()
    training, held = Training(), None
    for update in range(6):
        publisher.publish(Version(1, update), training[update])
        found = take(subscriber, held, Version(1, update))
        held = Version(1, update)
        assert memories() <= 2 + 1  # the receiver keeps what it showed last; so does this test
    del found
    subscriber.close()
    del subscriber
    publisher.close()
    assert memories() <= 1  # pytest still has the receiver, and so its base


def test_a_delta_that_can_not_be_made_costs_no_version(
    ends: Callable, same: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> bytes:
        raise MemoryError("no room")

    monkeypatch.setattr(publishing, "encode_delta", broken)
    publisher, subscriber = ends()
    training = Training()
    for update in range(3):
        publisher.publish(Version(1, update), training[update])
        assert same(take(subscriber, Version(1, update - 1) if update else None, Version(1, update)), training[update])
    assert subscriber.gauges()["delta_versions"] == 0
    assert [record.args[0] for record in caplog.records if "no room" in record.getMessage()] == [Version(1, 1), Version(1, 2)]


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Deltas that are never done unless they are given up; set as soon as one was begun."""
    begun = threading.Event()

    def encode(base: Any, new: Any, specs: Any, enough: threading.Event) -> None:
        begun.set()
        assert enough.wait(WAIT_S)

    monkeypatch.setattr(publishing, "encode_delta", encode)
    return begun


def test_the_next_version_waits_for_no_delta(ends: Callable, same: Callable, endless: threading.Event, until: Callable) -> None:
    publisher, subscriber = ends()
    training = Training()
    publisher.publish(Version(1, 0), training[0])
    take(subscriber, None, Version(1, 0))
    publisher.publish(Version(1, 1), training[1])
    assert endless.wait(WAIT_S)
    assert subscriber.next(Version(1, 0), 0.1) is None
    publisher.publish(Version(1, 2), training[2])
    assert same(take(subscriber, Version(1, 0), Version(1, 1)), training[1])
    until(lambda: holdings(publisher) == [Version(1, 1)])  # else 1.2 would be left out
    publisher.publish(Version(1, 3), training[3])
    assert same(take(subscriber, Version(1, 1), Version(1, 2)), training[2])
    assert subscriber.gauges()["delta_versions"] == 0
    assert [publisher.gauges()[name] for name in ("delta_s", "delta_bytes")] == [0, 0]


def test_closing_gives_a_delta_up(ends: Callable, endless: threading.Event) -> None:
    publisher, subscriber = ends()
    training = Training()
    publisher.publish(Version(1, 0), training[0])
    take(subscriber, None, Version(1, 0))
    publisher.publish(Version(1, 1), training[1])
    assert endless.wait(WAIT_S)
    publisher.close()  # else this would fail in the delta's thread, after WAIT_S
    assert publisher._enough.is_set()
    assert not publisher._pending


def test_who_shares_memory_does_not_wait_for_the_delta(
    bus: Any, ends: Callable, same: Callable, until: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*arguments: Any) -> bytes | None:
        assert go_on.wait(WAIT_S)
        return encode_delta(*arguments[:3])

    monkeypatch.setattr(publishing, "encode_delta", slow)
    publisher = bus.publisher(codec="delta")
    far = bus.subscriber(publisher, transport="tcp", codec="delta", name="far")
    near = bus.subscriber(publisher, codec="delta", name="near")
    training = Training()
    publisher.publish(Version(1, 0), training[0])
    take(near, None, Version(1, 0))
    take(far, None, Version(1, 0))
    publisher.publish(Version(1, 1), training[1])
    assert same(take(near, Version(1, 0), Version(1, 1)), training[1])
    assert far.next(Version(1, 0), 0.1) is None
    go_on.set()
    assert same(take(far, Version(1, 0), Version(1, 1)), training[1])
    assert (near.gauges()["shared_versions"], far.gauges()["delta_versions"]) == (2, 1)


def test_weights_of_no_bytes_and_a_receiver_that_left_leave_no_delta(ends: Callable, until: Callable) -> None:
    publisher, subscriber = ends()
    training = Training()
    publisher.publish(Version(1, 0), training[0])
    take(subscriber, None, Version(1, 0))
    publisher.publish(Version(1, 1), training[1])
    take(subscriber, Version(1, 0), Version(1, 1))
    assert publisher.gauges()["delta_bytes"] > 0
    for update in (2, 3):
        publisher.publish(Version(1, update), {"none": torch.empty(0, 3)})
        take(subscriber, Version(1, update - 1), Version(1, update))
    assert publisher.gauges()["delta_bytes"] == 0
    publisher.publish(Version(1, 4), training[0])
    take(subscriber, Version(1, 3), Version(1, 4))
    publisher.publish(Version(1, 5), training[1])
    take(subscriber, Version(1, 4), Version(1, 5))
    assert publisher.gauges()["delta_bytes"] > 0
    subscriber.close()
    until(lambda: publisher.gauges()["receivers"] == 0)
    publisher.publish(Version(1, 6), training[2])
    assert [publisher.gauges()[name] for name in ("delta_s", "delta_bytes")] == [0, 0]


def test_closing_while_a_delta_is_made_shows_it_to_nobody(
    ends: Callable, monkeypatch: pytest.MonkeyPatch, memories: Callable[[], int]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> bytes:
        begun.set()
        assert go_on.wait(WAIT_S)
        return b"delta"

    monkeypatch.setattr(publishing, "encode_delta", slow)
    publisher, subscriber = ends()
    training = Training()
    publisher.publish(Version(1, 0), training[0])
    take(subscriber, None, Version(1, 0))
    publisher.publish(Version(1, 1), training[1])
    assert begun.wait(WAIT_S)
    closing = threading.Thread(target=publisher.close)
    closing.start()
    go_on.set()
    closing.join(WAIT_S)
    assert publisher.gauges()["live_versions"] == 0
    assert subscriber.next(Version(1, 0), 0.1) is None
    assert memories() == 1  # the receiver's


# ------------------------------------------------------------------------------------------------- faults on the way


class Faulty:
    """A publisher played by hand, of one version whole and the next as a delta, of which the test may spoil anything."""

    def __init__(self, hand: Any, training: Training) -> None:
        self._hand = hand
        flat = [FlatTensors.copy_of(training[update], "weights") for update in range(3)]
        made = [
            encode_delta(flat[0].memory, flat[1].memory, flat[0].specs),
            encode_delta(flat[2].memory, flat[1].memory, flat[0].specs),  # against another base
        ]
        self.right, self.wrong = (data for data in made if data is not None)
        self._whole = [self._live(update, flat[update]) for update in range(2)]
        self.newest = 0
        self.delta = self.right
        self.spoil: Callable[[int, bytes], bytes | None] = lambda index, data: data
        self.bases: list[Version | None] = []

    def _live(self, update: int, tensors: FlatTensors) -> Live:
        nbytes = tensors.memory.nbytes
        manifest = Manifest(version=Version(1, update), tensors=tensors.specs, total_bytes=nbytes, bucket_bytes=200)
        return Live(manifest=manifest.signed(), memory=tensors.memory)

    def answer(self) -> None:
        """Answers all requests that are there."""
        whole, step = self._whole[self.newest], VersionDelta(base=Version(1, 0), version=Version(1, 1), data=self.delta)
        live = replace(whole, steps=(step,), forms={}) if self.newest else whole
        for request in self._hand.requests():
            match request:
                case Hello(sequence=sequence):
                    self._hand.send(Announce(version=live.version, echo=sequence))
                case GetManifest(base=base):
                    self.bases.append(base)
                    self._hand.send((live.form(base) or live.form(None)).manifest)
                case GetBucket(index=index, base=base, version=version) if version == live.version:
                    form = live.form(base)
                    payload, checksum = form.bucket(index)
                    sent = self.spoil(index, bytes(payload)) if base else bytes(payload)
                    if sent is not None:
                        self._hand.send(Bucket(version=version, index=index, checksum=checksum), sent)


@pytest.fixture
def faulty(bus: Any, until: Callable, monkeypatch: pytest.MonkeyPatch) -> tuple[Faulty, Any, Callable[[], Any]]:
    """The publisher, a receiver that holds the first version, and a turn of both."""
    monkeypatch.setattr("asyncrl.weights.subscriber.MAX_FAILURES", 100)
    publisher = Faulty(bus.hand_publisher(), Training())
    subscriber = bus.subscriber(publisher._hand, transport="tcp", codec="delta")
    held: list[Version | None] = [None]

    def turn() -> Any:
        publisher.answer()
        if (found := subscriber.next(held[0], 0.01)) is not None:
            held[0] = found[0]
        return found

    assert until(turn)[0] == Version(1, 0)
    publisher.newest = 1
    return publisher, subscriber, turn


def test_a_sound_delta_is_taken(faulty: Any, until: Callable, same: Callable) -> None:
    publisher, subscriber, turn = faulty
    assert same(until(turn)[1], Training()[1])
    assert publisher.bases == [None, Version(1, 0)]
    assert subscriber.gauges()["bad_transfers"] == 0


def test_a_delta_against_another_base_is_noticed_and_a_whole_version_asked_for(
    faulty: Any, until: Callable, same: Callable
) -> None:
    publisher, subscriber, turn = faulty
    publisher.delta = publisher.wrong
    assert same(until(turn)[1], Training()[1])
    assert publisher.bases == [None, Version(1, 0), None]
    assert subscriber.gauges()["bad_transfers"] == 1
    assert subscriber.gauges()["delta_versions"] == 0


@pytest.mark.parametrize("cut", [1, 100, 0.5, -1])
def test_a_delta_that_was_cut_off_before_it_was_signed_changes_nothing(
    faulty: Any, until: Callable, same: Callable, cut: float
) -> None:
    publisher, subscriber, turn = faulty
    publisher.delta = publisher.right[: cut if isinstance(cut, int) else int(len(publisher.right) * cut)]
    assert same(until(turn)[1], Training()[1])
    assert subscriber.gauges()["bad_transfers"] == 1


def test_a_bucket_of_a_delta_that_was_damaged_is_taken_again(faulty: Any, until: Callable, same: Callable) -> None:
    publisher, subscriber, turn = faulty
    rng, spoiled = random.Random(1), []

    def spoil(index: int, data: bytes) -> bytes | None:
        if len(spoiled) < 12 and rng.random() < 0.5:
            spoiled.append(index)
            at = rng.randrange(len(data))
            return rng.choice([None, data[:-1], data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]])
        return data

    publisher.spoil = spoil
    assert same(until(turn)[1], Training()[1])
    assert len(spoiled) == 12
    assert subscriber.gauges()["delta_versions"] == 1
    assert set(publisher.bases[1:]) == {Version(1, 0)}  # what was damaged on the way says nothing of the base


def test_a_publisher_that_dies_within_a_delta_leaves_the_version_before(bus: Any, same: Callable, until: Callable) -> None:
    training = Training()
    publishers = [bus.publisher(1, transport="tcp", codec="delta", bucket_bytes=50)]
    subscriber = bus.subscriber(resolve=lambda: publishers[-1].admit("generator-0"), transport="tcp", codec="delta", credit=1)
    publishers[0].publish(Version(1, 0), training[0])
    shown = take(subscriber, None, Version(1, 0))
    whole = subscriber.gauges()["received_bytes"]
    publishers[0].publish(Version(1, 1), training[1])
    received: list[Any] = []

    def half() -> bool:
        received.append(subscriber.next(Version(1, 0), 0.0))
        return subscriber.gauges()["received_bytes"] >= whole + 200

    until(half)
    publishers[0].close()
    received.append(subscriber.next(Version(1, 0), 0.2))
    assert received == [None] * len(received)
    assert same(shown, training[0])
    publishers.append(bus.publisher(2, transport="tcp", codec="delta"))
    publishers[1].publish(Version(2, 1), training[1])
    assert same(take(subscriber, Version(1, 0), Version(2, 1)), training[1])


@pytest.mark.parametrize(
    "wrong", [{"steps": (10,)}, {"base": Version(1, 0)}, {"base": Version(1, 0), "steps": (0,)}, {"steps": (1 << 40,)}]
)
def test_a_manifest_whose_deltas_make_no_sense_is_refused(packed: Callable, wrong: dict[str, Any]) -> None:
    _, manifest = packed(Version(1, 1), Training()[0])
    base = {"base": Version(1, 0)} if wrong == {"steps": (1 << 40,)} else {}
    with pytest.raises(BadTransfer, match="deltas of"):
        replace(manifest, **wrong, **base).signed().check()
