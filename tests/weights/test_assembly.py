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


def give(assembly: Assembly, data: bytes, index: int) -> None:
    part = memoryview(data)[assembly.manifest.bucket(index)]
    assembly.put(index, part, assembly.manifest.checksum(index, part))


def test_credit_bounds_what_is_outstanding(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    assert assembly.ask(credit=2, hello=1) == [0, 1]
    assert assembly.ask(credit=2, hello=1) == []
    give(assembly, data, 1)
    assert assembly.ask(credit=2, hello=1) == [2]
    give(assembly, data, 0)
    assert not assembly.whole
    give(assembly, data, 2)
    assert assembly.whole
    assert torch.equal(assembly.tensors()["w"], TENSORS["w"])


def test_an_answered_hello_shows_what_was_dropped(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    assembly.ask(credit=2, hello=1)
    assert assembly.answered(1) == 0  # asked after Hello 1: may still come
    give(assembly, data, 0)
    assert assembly.answered(2) == 1  # Hello 2 was asked later and answered earlier: bucket 1 is lost
    assert sorted(assembly.ask(credit=3, hello=2)) == [1, 2]


def test_not_whole_is_not_shown(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    give(assembly, data, 0)
    with pytest.raises(BadTransfer, match="2 buckets are missing"):
        assembly.tensors()


def test_repeated_and_unknown_buckets_change_nothing(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    give(assembly, data, 0)
    assembly.put(0, memoryview(b"garbage"), 0)
    assembly.put(99, memoryview(b"garbage"), 0)
    assert assembly.ask(credit=9, hello=0) == [1, 2]


def test_damage_and_wrong_length_are_refused(sent: tuple[bytes, Assembly]) -> None:
    data, assembly = sent
    with pytest.raises(BadTransfer, match="149 bytes, expected 150"):
        assembly.put(0, memoryview(data)[:149], 0)
    second = memoryview(data)[150:300]
    flipped = bytearray(second)
    flipped[7] ^= 1
    with pytest.raises(BadTransfer, match="bucket 1: checksum"):
        assembly.put(1, memoryview(flipped), assembly.manifest.checksum(1, second))


def test_in_the_publishers_memory_all_is_there(packed: Callable) -> None:
    copied = FlatTensors.copy_of(TENSORS, "weights")
    assembly = Assembly(packed(V, TENSORS, 150)[1], copied.memory)
    assert assembly.whole
    assert assembly.ask(credit=2, hello=1) == []
    assert torch.equal(assembly.tensors()["w"], TENSORS["w"])
    assert assembly.tensors()["w"].data_ptr() == copied["w"].data_ptr()  # without a copy


def test_every_version_has_memory_of_its_own_which_nobody_can_change(packed: Callable) -> None:
    def receive(number: int) -> FlatTensors:
        data, manifest = packed(Version(1, number), {"w": torch.full((100,), float(number))}, 150)
        assembly = Assembly(manifest)
        for index in range(3):
            give(assembly, data, index)
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
