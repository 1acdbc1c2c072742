import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncrl.errors import BadTransfer, Closed, Unavailable
from asyncrl.models.layout import DTYPES
from asyncrl.models.memory import FlatTensors, Place, WeightMemory, here
from asyncrl.types import Version
from asyncrl.weights.link import REDISCOVER_POLLS
from asyncrl.weights.messages import Announce, GetBucket, GetManifest, Gone, Hello, Refused
from asyncrl.weights.sockets import Address

WAIT_S = 20.0
TRANSPORTS = ("auto", "tcp")
PUBLISHER = """
import sys, msgspec, torch
from asyncrl.types import Version
from asyncrl.weights.publisher import WeightPublisher
publisher = WeightPublisher(1, transport="tcp", bucket_bytes=1000)
publisher.publish(Version(1, 9), {"embed": torch.full((5000,), 9.0)})
print(msgspec.json.encode(publisher.admit("generator-0")).decode(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_late_join_gets_the_newest(bus: Any, weights: Callable, same: Callable, until: Callable, transport: str) -> None:
    publisher = bus.publisher()
    for update in range(4):
        publisher.publish(Version(1, update), weights(update))
    subscriber = bus.subscriber(publisher, transport=transport)
    seen: list[int] = []

    def newest() -> bool:
        found = subscriber.next(Version(1, seen[-1]) if seen else None, 0.05)
        if found:
            seen.append(found[0].update)
            assert same(found[1], weights(found[0].update))
        return bool(seen) and seen[-1] == 3

    until(newest)
    assert seen[0] >= 2  # 3 may still have been unsealed
    assert subscriber.next(Version(1, 3), 0.1) is None
    assert subscriber.gauges()["shared_versions"] == (len(seen) if transport == "auto" else 0)
    assert publisher.gauges()["sent_bytes"] == (0 if transport == "auto" else len(seen) * publisher.gauges()["staged_bytes"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_state_dict_arrives_whole(bus: Any, same: Callable, transport: Literal["auto", "tcp"]) -> None:
    publisher = bus.publisher(transport=transport, bucket_bytes=100)
    subscriber = bus.subscriber(publisher, transport=transport, credit=3)
    updates = itertools.count()
    names = sorted(set(DTYPES) - {"bool"})

    @settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(names), st.lists(st.integers(0, 6), max_size=3)), max_size=6), st.randoms())
    def arrives(layers: list[tuple[str, list[int]]], random: Any) -> None:
        tensors = {}
        for index, (dtype, shape) in enumerate(layers):
            size = torch.empty(shape).numel() * DTYPES[dtype].itemsize
            raw = torch.tensor(list(random.randbytes(size)), dtype=torch.uint8)
            tensors[f"layer.{index}"] = raw.view(DTYPES[dtype]).reshape(shape)
        version = Version(1, next(updates))
        publisher.publish(version, tensors)
        found = subscriber.next(Version(1, version.update - 1), WAIT_S)
        assert found is not None
        assert found[0] == version
        raw_bytes = {n: t.contiguous().reshape(-1).view(torch.uint8) for n, t in found[1].items()}
        assert same(raw_bytes, {n: t.contiguous().reshape(-1).view(torch.uint8) for n, t in tensors.items()})
        assert all((t.dtype, t.shape) == (tensors[n].dtype, tensors[n].shape) for n, t in found[1].items())

    arrives()


def test_waits_for_a_version_to_come(bus: Any, weights: Callable) -> None:
    publisher = bus.publisher()
    subscriber = bus.subscriber(publisher, poll_s=WAIT_S)  # only the hint can be in time
    assert subscriber.next(None, 0.0) is None
    threading.Timer(0.1, publisher.publish, (Version(1, 1), weights(1))).start()
    found = subscriber.next(None, WAIT_S / 2)
    assert found is not None
    assert found[0] == Version(1, 1)


def test_another_nodes_memory_is_not_looked_for(bus: Any, weights: Callable, packed: Callable, until: Callable) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher)
    data, manifest = packed(Version(1, 1), weights(1))
    near = FlatTensors.copy_of(weights(1), "weights")
    far = replace(manifest, place=replace(near.memory.place, here="elsewhere")).signed()
    assert until(lambda: drive(subscriber, publisher, data, far)) is not None
    assert subscriber.gauges()["shared_versions"] == 0


@pytest.mark.parametrize("place", [Place(here(), "/proc/self/fd/9999", b""), Place(here(), "/dev/null", b"")])
def test_memory_that_is_not_there_falls_back_to_the_socket(
    bus: Any, weights: Callable, packed: Callable, same: Callable, until: Callable, place: Place
) -> None:
    publisher = bus.hand_publisher()  # its memory may be gone, or another user's
    subscriber = bus.subscriber(publisher)
    data, manifest = packed(Version(1, 1), weights(1))
    version, tensors = until(lambda: drive(subscriber, publisher, data, replace(manifest, place=place).signed()))
    assert version == Version(1, 1)
    assert same(tensors, weights(1))
    assert subscriber.gauges()["shared_versions"] == 0


def test_a_version_that_is_dropped_while_it_is_opened_gives_way_to_the_newest(
    bus: Any, weights: Callable, same: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = bus.publisher()
    publisher.publish(Version(1, 1), weights(1))
    subscriber = bus.subscriber(publisher)
    places: list[Place] = []

    def late(place: Place, nbytes: int) -> WeightMemory | None:
        monkeypatch.undo()
        places.append(place)
        for update in (2, 3):
            publisher.publish(Version(1, update), weights(update))
        opened = WeightMemory.open(place, nbytes)
        assert opened is None  # its descriptor is closed, or another version's
        return opened

    monkeypatch.setattr(WeightMemory, "open", late)
    found = subscriber.next(None, WAIT_S)
    assert places
    assert found is not None
    assert found[0] > Version(1, 1)
    assert same(found[1], weights(found[0].update))


def test_on_one_node_nothing_is_copied_and_it_outlives_the_publisher(bus: Any, weights: Callable, same: Callable) -> None:
    publisher = bus.publisher()
    publisher.publish(Version(1, 1), weights(1))
    found = [bus.subscriber(publisher, name=name).next(None, WAIT_S) for name in ("generator-0", "generator-1")]
    inodes = {os.stat(tensors.memory.place.path).st_ino for _, tensors in found}
    assert len(inodes) == 1
    publisher.close()
    assert all(same(tensors, weights(1)) for _, tensors in found)


def test_a_restarted_publisher_is_found_and_its_smaller_update_supersedes(bus: Any, weights: Callable, same: Callable) -> None:
    publishers = [bus.publisher(1)]
    subscriber = bus.subscriber(resolve=lambda: publishers[-1].admit("generator-0"))
    publishers[0].publish(Version(1, 50), weights(50))
    found = subscriber.next(None, WAIT_S)
    assert found is not None
    publishers.append(bus.publisher(2))
    publishers[1].publish(Version(2, 3), weights(3))
    publishers[0].close()
    found = subscriber.next(found[0], WAIT_S)
    assert found is not None
    assert found[0] == Version(2, 3)
    assert same(found[1], weights(3))


def test_a_zombie_that_still_answers_is_left_for_its_successor(bus: Any, weights: Callable) -> None:
    publishers = [bus.publisher(1)]
    subscriber = bus.subscriber(resolve=lambda: publishers[-1].admit("generator-0"))
    publishers[0].publish(Version(1, 1), weights(1))
    assert subscriber.next(None, WAIT_S) is not None
    publishers.append(bus.publisher(2))
    publishers[1].publish(Version(2, 0), weights(0))
    found = subscriber.next(Version(1, 1), WAIT_S)
    assert found is not None
    assert found[0] == Version(2, 0)


@pytest.mark.parametrize("moved", [False, True])
def test_while_the_publisher_answers_it_is_looked_for_only_if_it_may_have_moved(bus: Any, until: Callable, moved: bool) -> None:
    publisher, asked = bus.publisher(), itertools.count()

    def resolve() -> Address:
        next(asked)
        return publisher.admit("generator-0")

    resolve.moved = lambda: moved  # type: ignore[attr-defined]
    subscriber = bus.subscriber(resolve=resolve, poll_s=0.01)
    until(lambda: subscriber.next(None, 0.05) is None and subscriber._link.hello > 3 * REDISCOVER_POLLS)
    assert (next(asked) > 2) == moved


def test_an_older_incarnation_is_never_gone_back_to(bus: Any, weights: Callable, until: Callable) -> None:
    old, new = bus.publisher(1), bus.publisher(2)
    answers = [new.admit("generator-0")]
    subscriber = bus.subscriber(resolve=lambda: answers[-1], deadline_s=3.0)
    old.publish(Version(1, 9), weights(9))
    new.publish(Version(2, 1), weights(1))
    assert subscriber.next(None, WAIT_S) is not None
    answers.append(old.admit("generator-0"))
    new.close()
    with pytest.raises(Unavailable, match="incarnation 1, older than 2"):
        subscriber.next(None, WAIT_S)


def test_a_publisher_killed_mid_transfer_is_never_seen(bus: Any, weights: Callable, same: Callable, until: Callable) -> None:
    child = subprocess.Popen([sys.executable, "-c", PUBLISHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    addresses = [msgspec.json.decode(child.stdout.readline(), type=Address)]
    subscriber = bus.subscriber(resolve=lambda: addresses[-1], credit=1)
    received: list[Any] = []

    def half() -> bool:
        received.append(subscriber.next(None, 0.0))  # one bucket a call, of 20
        return subscriber.gauges()["received_bytes"] >= 2000

    until(half)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(WAIT_S)
    received.append(subscriber.next(None, 0.3))
    assert received == [None] * len(received)
    publisher = bus.publisher(2)
    publisher.publish(Version(2, 0), weights(0))
    addresses.append(publisher.admit("generator-0"))
    found = subscriber.next(None, WAIT_S)
    assert found is not None
    assert found[0] == Version(2, 0)
    assert same(found[1], weights(0))


def test_a_dead_publisher_is_a_named_error_before_the_deadline(bus: Any, weights: Callable) -> None:
    publisher = bus.publisher()
    publisher.publish(Version(1, 1), weights(1))
    subscriber = bus.subscriber(publisher, deadline_s=1.5)
    assert subscriber.next(None, WAIT_S) is not None
    publisher.close()
    begin = time.monotonic()
    with pytest.raises(Unavailable, match=r"publisher \(tcp://127.*generator-0 has heard nothing for \d+\.\d s .*connection"):
        subscriber.next(Version(1, 1), WAIT_S)
    assert time.monotonic() - begin < WAIT_S / 2


def test_a_publisher_that_falls_silent_is_named_too(bus: Any) -> None:
    publisher = bus.hand_publisher()  # accepts the connection, never answers
    subscriber = bus.subscriber(publisher, deadline_s=0.5)
    with pytest.raises(Unavailable, match="does not answer"):
        subscriber.next(None, WAIT_S)


def test_no_publisher_at_all(bus: Any) -> None:
    with pytest.raises(Unavailable, match=r"no address.*knows of no publisher"):
        bus.subscriber(resolve=lambda: None, deadline_s=0.2).next(None, WAIT_S)

    def broken() -> Address:
        raise Unavailable("the supervisor is away")

    with pytest.raises(Unavailable, match="the supervisor is away"):
        bus.subscriber(resolve=broken, deadline_s=0.2).next(None, WAIT_S)


def test_a_wrong_key_is_refused_by_name(bus: Any, weights: Callable) -> None:
    publisher, other = bus.publisher(), bus.publisher()
    publisher.publish(Version(1, 1), weights(1))
    theirs = other.admit("generator-0")
    keys = {"client_public": theirs.client_public, "client_secret": theirs.client_secret}
    stolen = msgspec.structs.replace(publisher.admit("generator-0"), **keys)
    with pytest.raises(Unavailable, match="refused our key"):
        bus.subscriber(resolve=lambda: stolen, deadline_s=1.5).next(None, WAIT_S)


def drive(subscriber: Any, publisher: Any, data: bytes, manifest: Any, buckets: Any = None) -> Any:
    publisher.answer(data, manifest, buckets)
    return subscriber.next(None, 0.01)


def test_a_damaged_bucket_starts_the_version_again(
    bus: Any, weights: Callable, packed: Callable, same: Callable, until: Callable
) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher)
    data, manifest = packed(Version(1, 1), weights(1))
    damage = [b"\0" * 1000, b"\1" * 7]

    def buckets(index: int) -> bytes:
        return damage.pop() if index == 5 and damage else data[index * 1000 : (index + 1) * 1000]

    version, tensors = until(lambda: drive(subscriber, publisher, data, manifest, buckets))
    assert version == Version(1, 1)
    assert same(tensors, weights(1))
    assert subscriber.gauges()["bad_transfers"] == 2


def test_damage_without_end_is_raised(
    bus: Any, weights: Callable, packed: Callable, until: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncrl.weights.subscriber.MAX_FAILURES", 4)
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher)
    data, manifest = packed(Version(1, 1), weights(1))
    with pytest.raises(BadTransfer, match="bucket 0"):
        until(lambda: drive(subscriber, publisher, data, manifest, lambda index: b"\0" * 1000))
    assert subscriber.gauges()["bad_transfers"] == 4


def test_a_dropped_bucket_is_asked_again(
    bus: Any, weights: Callable, packed: Callable, same: Callable, until: Callable
) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher, credit=2)
    data, manifest = packed(Version(1, 1), weights(1))
    drops = [3, 7]

    def buckets(index: int) -> bytes | None:
        if index in drops:
            drops.remove(index)
            return None
        return data[index * 1000 : (index + 1) * 1000]

    _, tensors = until(lambda: drive(subscriber, publisher, data, manifest, buckets))
    assert same(tensors, weights(1))
    asked = [request.index for request in publisher.seen if isinstance(request, GetBucket)]
    assert sorted(asked) == sorted([*range(manifest.bucket_count), 3, 7])
    assert subscriber.gauges()["asked_again"] == 2


def test_credit_bounds_what_is_asked_ahead(bus: Any, weights: Callable, packed: Callable, until: Callable) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher, credit=3)
    data, manifest = packed(Version(1, 1), weights(1))

    def asked() -> int:
        drive(subscriber, publisher, data, manifest, lambda index: None)
        return sum(isinstance(request, GetBucket) for request in publisher.seen)

    until(lambda: asked() >= 3)
    assert {request.index for request in publisher.seen if isinstance(request, GetBucket)} == {0, 1, 2}


def test_nonsense_and_refusals_end_in_bad_transfer(bus: Any, until: Callable) -> None:
    for send in (lambda p: p.send_raw(b"\xc1nonsense"), lambda p: p.send(Refused(reason="who are you"))):
        publisher = bus.hand_publisher()
        subscriber = bus.subscriber(publisher)

        def turn(publisher: Any = publisher, subscriber: Any = subscriber, send: Any = send) -> bool:
            if publisher.requests():
                send(publisher)
            return subscriber.next(None, 0.01) is not None

        with pytest.raises(BadTransfer, match=r"can't read|who are you"):
            until(turn)


def test_a_version_that_went_away_leads_to_the_newest(
    bus: Any, weights: Callable, packed: Callable, same: Callable, until: Callable
) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher, credit=1)
    data1, manifest1 = packed(Version(1, 1), weights(1))
    data2, manifest2 = packed(Version(1, 2), weights(2))

    def buckets(index: int) -> bytes | None:
        if index < 4:
            return data1[index * 1000 : (index + 1) * 1000]
        publisher.send(Gone(version=Version(1, 1)))
        return None

    until(lambda: drive(subscriber, publisher, data1, manifest1, buckets) or subscriber.gauges()["received_bytes"] == 4000)
    drive(subscriber, publisher, data1, manifest1, buckets)
    version, tensors = until(lambda: drive(subscriber, publisher, data2, manifest2))
    assert version == Version(1, 2)
    assert same(tensors, weights(2))


def test_from_the_request_for_its_manifest_on_every_hello_names_the_version(
    bus: Any, weights: Callable, packed: Callable, until: Callable
) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher, transport="tcp")
    _, manifest = packed(Version(1, 1), weights(1))

    def turn() -> bool:
        """The publisher says what is newest, and takes its time with the manifest."""
        for request in publisher.requests():
            if isinstance(request, Hello) and not asked():
                publisher.send(Announce(version=manifest.version, echo=request.sequence))
        subscriber.next(None, 0.01)
        return bool(asked()) and isinstance(publisher.seen[-1], Hello)

    def asked() -> list[int]:
        return [index for index, request in enumerate(publisher.seen) if isinstance(request, GetManifest)]

    until(turn)
    assert {request.pulling for request in publisher.seen[asked()[0] + 1 :]} == {Version(1, 1)}


def test_a_stalled_subscriber_holds_up_nobody_and_gets_its_version_in_the_end(
    bus: Any, weights: Callable, same: Callable, until: Callable
) -> None:
    publisher = bus.publisher(transport="tcp")
    stalled = bus.subscriber(publisher, credit=1, name="stalled")
    healthy = bus.subscriber(publisher, credit=4, name="healthy")
    publisher.publish(Version(1, 0), weights(0))
    until(lambda: stalled.next(None, 0.0) is None and stalled.gauges()["received_bytes"] >= 1000)
    for update in range(1, 6):
        publisher.publish(Version(1, update), weights(update))  # returns although `stalled` is amid a transfer
        found = healthy.next(Version(1, update - 1), WAIT_S)
        assert found is not None
        assert found[0] == Version(1, update)
        assert same(found[1], weights(update))
        assert publisher.gauges()["live_versions"] <= 2
    assert stalled.gauges()["received_bytes"] < 20_000
    held: Version | None = None
    while held != Version(1, 5):
        found = stalled.next(held, WAIT_S)
        assert found is not None
        held = found[0]
        assert same(found[1], weights(held.update))  # old or new, never a mixture


def test_one_that_pulls_slowly_takes_no_versions_from_the_others(bus: Any, weights: Callable, same: Callable) -> None:
    publisher = bus.publisher(transport="tcp")
    slow, fast = (bus.subscriber(publisher, credit=1, name=name) for name in ("slow", "fast"))
    taken: list[Version | None] = [None]

    def take_one_bucket(subscriber: Any, holds: Version | None) -> None:
        before, deadline = subscriber.gauges()["received_bytes"], time.monotonic() + WAIT_S
        while subscriber.gauges()["received_bytes"] == before:
            assert time.monotonic() < deadline
            found = subscriber.next(holds, 0.0)
            if found is not None and subscriber is fast:
                assert same(found[1], weights(found[0].update))
                taken.append(found[0])

    for update in range(30):  # a version comes while one bucket of 21 is taken, or twelve
        publisher.publish(Version(1, update), weights(update))
        assert publisher.gauges()["live_versions"] <= 3
        take_one_bucket(slow, None)
        for _ in range(12):
            if taken[-1] != Version(1, update):
                take_one_bucket(fast, taken[-1])
    assert len(taken) - 1 >= 12  # of 17 that it could take alone


def test_publishing_faster_than_pulling_still_makes_progress(bus: Any, weights: Callable, same: Callable) -> None:
    publisher = bus.publisher(transport="tcp")
    subscriber = bus.subscriber(publisher, credit=1)
    held: Version | None = None
    arrived = 0
    updates = itertools.count()
    deadline = time.monotonic() + WAIT_S
    while arrived < 3:
        assert time.monotonic() < deadline
        update = next(updates)
        publisher.publish(Version(1, update), weights(update))  # one per bucket or two
        found = subscriber.next(held, 0.0)
        if found is not None:
            assert same(found[1], weights(found[0].update))
            held, arrived = found[0], arrived + 1


@pytest.mark.parametrize("found", [True, False])
def test_close_from_another_thread_ends_a_wait(bus: Any, found: bool) -> None:
    publisher = bus.publisher()
    subscriber = bus.subscriber(resolve=lambda: publisher.admit("generator-0") if found else None, poll_s=WAIT_S)
    outcome: list[type] = []
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        try:
            subscriber.next(None, WAIT_S)
        except Closed as error:
            outcome.append(type(error))

    thread = threading.Thread(target=wait)
    begin = time.monotonic()
    thread.start()
    assert entered.wait(WAIT_S)
    subscriber.close()
    thread.join(WAIT_S)
    assert outcome == [Closed]
    assert time.monotonic() - begin < WAIT_S / 2
    subscriber.close()
    with pytest.raises(Closed):
        subscriber.next(None, 0.0)


def test_a_lost_hint_costs_one_poll(bus: Any, weights: Callable, packed: Callable, until: Callable) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher)
    data, manifest = packed(Version(1, 1), weights(1))

    def idle() -> bool:
        for request in publisher.requests():
            publisher.send(Announce(version=None, echo=request.sequence))
        subscriber.next(None, 0.01)
        return len(publisher.seen) >= 2

    until(idle)
    assert until(lambda: drive(subscriber, publisher, data, manifest))[0] == Version(1, 1)


def test_zero_credit_is_refused(bus: Any) -> None:
    with pytest.raises(ValueError, match="credit=0 < 1"):
        bus.subscriber(bus.publisher(), credit=0)
