import math
import threading
from collections.abc import Callable

import pytest
import torch
from msgspec.structs import replace

from asyncrl.errors import BadTransfer
from asyncrl.models.memory import FlatTensors, WeightMemory
from asyncrl.types import Version
from asyncrl.weights.assembly import Assembly

V = Version(1, 1)
TENSORS = {"w": torch.arange(100, dtype=torch.int32)}  # 400 bytes: buckets of 150, 150, 100


@pytest.fixture
def sent(packed: Callable) -> tuple[bytes, Assembly]:
    data, manifest = packed(V, TENSORS, 150)
    return data, Assembly(manifest)


def bucket(data: bytes, index: int) -> memoryview:
    return memoryview(data)[index * 150 : (index + 1) * 150]


def test_credit_bounds_what_is_outstanding(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    assert assembly.ask(credit=2, hello=1) == [0, 1]
    assert assembly.ask(credit=2, hello=1) == []
    assembly.put(1, bucket(data, 1))
    assert assembly.ask(credit=2, hello=1) == [2]
    assembly.put(0, bucket(data, 0))
    assert not assembly.whole
    assembly.put(2, bucket(data, 2))
    assert assembly.whole
    assert torch.equal(assembly.tensors()["w"], TENSORS["w"])


def test_an_answered_hello_shows_what_was_dropped(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    assembly.ask(credit=2, hello=1)
    assert assembly.answered(1) == 0  # asked after Hello 1: may still come
    assembly.put(0, bucket(data, 0))
    assert assembly.answered(2) == 1  # Hello 2 was asked later and answered earlier: bucket 1 is lost
    assert sorted(assembly.ask(credit=3, hello=2)) == [1, 2]


def test_not_whole_is_not_shown(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    assembly.put(0, bucket(data, 0))
    with pytest.raises(BadTransfer, match="2 buckets are missing"):
        assembly.tensors()


def test_repeated_and_unknown_buckets_change_nothing(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    assembly.put(0, bucket(data, 0))
    assembly.put(0, memoryview(b"garbage"))
    assembly.put(99, memoryview(b"garbage"))
    assert assembly.ask(credit=9, hello=0) == [1, 2]


def test_damage_and_wrong_length_are_refused(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    with pytest.raises(BadTransfer, match="149 bytes, expected 150"):
        assembly.put(0, bucket(data, 0)[:149])
    flipped = bytearray(bucket(data, 1))
    flipped[7] ^= 1
    with pytest.raises(BadTransfer, match="bucket 1: checksum"):
        assembly.put(1, memoryview(flipped))


def test_verifies_the_publishers_memory_and_pauses_when_told(packed: Callable) -> None:
    copied = FlatTensors.copy_of(TENSORS, "weights")
    assembly = Assembly(packed(V, TENSORS, 150)[1], copied.memory)
    assert assembly.verify_shared(until=0.0, stop=threading.Event()) == 150
    assert not assembly.whole
    assert assembly.verify_shared(until=math.inf, stop=threading.Event()) == 250
    assert torch.equal(assembly.tensors()["w"], TENSORS["w"])
    assert assembly.tensors()["w"].data_ptr() == copied["w"].data_ptr()  # without a copy


def test_damage_in_the_publishers_memory_is_refused(packed: Callable) -> None:
    other = FlatTensors.copy_of({"w": TENSORS["w"].clone().index_fill_(0, torch.tensor(50), 7)}, "weights")
    assembly = Assembly(packed(V, TENSORS, 150)[1], other.memory)
    with pytest.raises(BadTransfer, match="bucket 1: checksum"):
        assembly.verify_shared(until=math.inf, stop=threading.Event())
    with pytest.raises(BadTransfer, match="2 buckets are missing"):
        assembly.tensors()


def test_every_version_has_memory_of_its_own_which_nobody_can_change(packed: Callable) -> None:
    def receive(number: int) -> FlatTensors:
        data, manifest = packed(Version(1, number), {"w": torch.full((100,), float(number))}, 150)
        assembly = Assembly(manifest)
        for index in range(3):
            assembly.put(index, bucket(data, index))
        return assembly.tensors()

    received = [receive(number) for number in range(3)]
    assert [tensors["w"].unique().tolist() for tensors in received] == [[0.0], [1.0], [2.0]]
    for tensors in received:
        with pytest.raises(PermissionError):
            tensors.memory.write(0, memoryview(b"x"))
    received[1]["w"].zero_()  # whoever writes there writes to a page of its own
    opened = WeightMemory.open(received[1].memory.place, 400)
    assert opened is not None
    assert opened.flat.view(torch.float32).unique().tolist() == [1.0]


def test_no_memory_is_taken_for_a_bad_manifest(packed: Callable) -> None:
    _, manifest = packed(V, TENSORS, 150)
    with pytest.raises(BadTransfer, match="total_bytes"):
        Assembly(replace(manifest, total_bytes=1 << 62).signed())
