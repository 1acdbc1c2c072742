"""Whatever arrives, only the documented errors leave the bus, and no memory is taken for nonsense.

`python tests/weights/test_fuzz.py SECONDS [SEED]` goes on for longer, from another seed, and prints what it found.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from asyncrl.errors import BadTransfer, ConfigError
from asyncrl.models import memory
from asyncrl.models.layout import TensorSpec, lay_out, total_bytes
from asyncrl.models.memory import FlatTensors, Place, WeightMemory, here
from asyncrl.types import Version
from asyncrl.weights import messages
from asyncrl.weights.assembly import Assembly
from asyncrl.weights.messages import Announce, Bucket, Bye, GetBucket, GetManifest, Gone, Hello, Manifest, Refused

V = Version(3, 7)
TENSORS = {"embed": torch.zeros(50), "head": torch.zeros(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
SPECS = lay_out(TENSORS)
MANIFEST = Manifest(
    version=V,
    tensors=SPECS,
    total_bytes=total_bytes(SPECS),
    bucket_bytes=100,
    place=Place("h", "/p", b"t"),
)
REPLIES = [
    MANIFEST.signed(),
    Announce(version=V, echo=3),
    Bucket(version=V, index=1, checksum=5, number=9),
    Gone(version=V),
    Refused(reason="no"),
]
REQUESTS = [
    Hello(sequence=9, holds=V, pulling=V, here=here(), confirms=4),
    GetBucket(version=V, index=2, confirms=7),
    GetManifest(version=V),
    Bye(),
]
NUMBERS = [0, 1, -1, 63, 64, 1 << 31, 1 << 36, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
# Beginnings of msgpack values that claim to be long, deep, or not text.
CLAIMS = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 5000,
    b"\xa1\xff",
]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of a message's bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if changed:
                changed[at - 1] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at - 1] = rng.randrange(256)
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = rng.randbytes(rng.randint(1, 9))
            case 4:
                changed[at : at + rng.randint(0, 9)] = rng.choice(CLAIMS)
            case 5:
                changed[at : at + 9] = b"\xcf" + rng.choice(NUMBERS).to_bytes(9, signed=True)[1:]
    return bytes(changed)


def wild(rng: random.Random) -> Manifest:
    """A manifest that is signed, so that its checksum hides nothing, with some fields that are not what they should be."""
    specs = list(SPECS)
    for _ in range(rng.randint(0, 2)):
        at = rng.randrange(len(specs))
        sizes = rng.choices([*NUMBERS, *range(8)], k=rng.choice([0, 1, 2, 3, 70]))
        offset = rng.choice([*NUMBERS, 64, 128, 640])
        changes = [{"shape": tuple(sizes)}, {"offset": offset}, {"dtype": "int8"}, {"dtype": "object"}, {"name": "embed"}]
        specs[at] = replace(specs[at], **rng.choice(changes))
    fitting = replace(MANIFEST, tensors=tuple(specs), place=rng.choice([None, MANIFEST.place, Place(here(), "/x\0", b"")]))
    if rng.random() < 0.7:  # consistent as far as it can be
        total = total_bytes([spec for spec in specs if spec.dtype in ("float32", "bfloat16", "int8")])
        bucket = rng.choice([100, 1 << 26, max(1, total)])
        return replace(fitting, total_bytes=total, bucket_bytes=bucket)
    return replace(fitting, **{rng.choice(["total_bytes", "bucket_bytes"]): rng.choice(NUMBERS)})


def receive(rng: random.Random, data: bytes) -> str:
    """What a subscriber does with one reply; returns what came of it."""
    try:
        reply = messages.decode_reply(data)
    except messages.UNREADABLE:
        return "unreadable"
    if not isinstance(reply, Manifest):
        return "read"
    try:
        shared = WeightMemory.open(reply.place, reply.total_bytes) if reply.place else None
        assembly = Assembly(reply, shared)
        for index in (-1, 0, reply.bucket_count, rng.choice(NUMBERS)):
            with suppress(BadTransfer):
                assembly.put(index, memoryview(bytes(rng.randint(0, 200))), 0)
        FlatTensors(reply.tensors, WeightMemory.create(reply.total_bytes, "weights"))  # as if all of it had come
    except BadTransfer:
        return "bad transfer"
    except ConfigError:
        return "too large"
    return "whole"


def fuzz(seed: int, rounds: int) -> Counter[str]:
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    for _ in range(rounds):
        found[f"reply: {receive(rng, damaged(rng, messages.encode(rng.choice(REPLIES))))}"] += 1
        found[f"manifest: {receive(rng, messages.encode(_signed(wild(rng))))}"] += 1
        try:
            messages.decode_request(damaged(rng, messages.encode(rng.choice(REQUESTS))))
            found["request: read"] += 1
        except messages.UNREADABLE:
            found["request: unreadable"] += 1
    return found


def _signed(manifest: Manifest) -> Manifest:
    try:
        return manifest.signed()
    except OverflowError:  # msgpack has no such number
        return MANIFEST.signed()


def peak_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)


@pytest.mark.parametrize("seed", range(4))
def test_no_message_raises_more_than_is_documented_or_takes_memory(seed: int, little_memory: None) -> None:
    before = peak_bytes()
    found = fuzz(seed, 1000)
    assert {"reply: unreadable", "reply: bad transfer", "manifest: bad transfer", "manifest: whole"} <= found.keys()
    assert peak_bytes() - before < 100 << 20


def test_text_that_is_none_and_nesting_without_end_are_unreadable() -> None:
    for decode in (messages.decode_reply, messages.decode_request):
        for data in (b"\x82\xa4type\xa7refused\xa6reason\xa1\xff", b"\x82\xa4type\xa3bye\xa1x" + b"\x91" * 60_000, b""):
            with pytest.raises(messages.UNREADABLE):
                decode(data)


@pytest.mark.parametrize("total", [64 << 30, 1 << 40, (1 << 60) - 64])
def test_a_sound_manifest_of_more_than_there_is_says_so(total: int) -> None:
    spec = TensorSpec("w", "uint8", (total,), 0)
    huge = replace(MANIFEST, tensors=(spec,), total_bytes=total, bucket_bytes=messages.MAX_BUCKET_BYTES)
    with pytest.raises(ConfigError, match=r"need .* bytes of memory"):
        Assembly(huge.signed())


def test_a_publisher_outlives_damaged_requests(bus: Any, weights: Callable, raw_dealer: Callable, until: Callable) -> None:
    publisher = bus.publisher(transport="tcp")
    publisher.publish(Version(1, 1), weights(1))
    rng, dealer = random.Random(0), raw_dealer(publisher.admit("generator-0"))
    for _ in range(500):
        dealer.send_multipart([damaged(rng, messages.encode(rng.choice(REQUESTS))) for _ in range(rng.choice([1, 1, 1, 2]))])
        while dealer.poll(0):
            dealer.recv_multipart()
    until(lambda: publisher.gauges()["bad_requests"] >= 300)
    found = bus.subscriber(publisher, transport="tcp").next(None, 20.0)
    assert found is not None


def test_a_subscriber_outlives_damaged_replies(
    bus: Any, weights: Callable, packed: Callable, same: Callable, until: Callable, little_memory: None
) -> None:
    publisher = bus.hand_publisher()
    subscriber = bus.subscriber(publisher)
    data, manifest = packed(Version(1, 1), weights(1))
    rng = random.Random(0)
    errors = 0

    def turn() -> bool:
        nonlocal errors
        publisher.requests()
        for _ in range(5):
            if publisher.peer:
                reply = rng.choice([manifest, *REPLIES])
                publisher.send_raw(damaged(rng, messages.encode(reply)), rng.randbytes(rng.randint(0, 9)))
        try:
            assert subscriber.next(None, 0.0) is None
        except (BadTransfer, ConfigError):
            errors += 1
        return errors >= 50

    until(turn)

    def whole() -> Any:
        publisher.answer(data, manifest)
        try:
            return subscriber.next(None, 0.01)
        except (BadTransfer, ConfigError):  # what was on the way
            return None

    assert same(until(whole)[1], weights(1))


if __name__ == "__main__":
    memory.available_bytes = lambda: 1 << 20  # type: ignore[assignment, misc]
    seconds, number = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    end, counts, start = time.monotonic() + seconds, Counter[str](), peak_bytes()
    while time.monotonic() < end:
        counts += fuzz(number, 1000)
        number += 1
    more = (peak_bytes() - start) >> 20
    print(f"{counts.total():,} messages, last seed {number - 1}, {more} MiB more memory at the peak")
    for kind, count in sorted(counts.items()):
        print(f"{count:>12,} {kind}")
