import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from asyncrl.errors import BadTransfer
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


def test_reads_a_file_and_pauses_when_told(sent: tuple[bytes, Assembly], tmp_path: Path) -> None:
    data, assembly = sent
    path = tmp_path / "w"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    assert assembly.read(fd, stop=lambda: True) == 150
    assert not assembly.whole
    assert assembly.read(fd, stop=lambda: False) == 250
    assert torch.equal(assembly.tensors()["w"], TENSORS["w"])
    os.close(fd)


def test_a_file_cut_short_is_refused(sent: tuple[bytes, Assembly], tmp_path: Path) -> None:
    data, assembly = sent
    path = tmp_path / "w"
    path.write_bytes(data[:300])
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(BadTransfer, match="bucket 2: the shared file ends early"):
        assembly.read(fd, stop=lambda: False)
    os.close(fd)


def test_buffer_is_reused_only_at_the_same_size(packed: Callable) -> None:
    _, manifest = packed(V, TENSORS, 150)
    first = Assembly(manifest)
    assert Assembly(manifest, first.data).data is first.data
    _, bigger = packed(V, {"w": torch.zeros(101)}, 150)
    assert len(Assembly(bigger, first.data).data) == 404


def test_no_memory_is_taken_for_a_bad_manifest(packed: Callable) -> None:
    _, manifest = packed(V, TENSORS, 150)
    with pytest.raises(BadTransfer, match="total_bytes"):
        Assembly(replace(manifest, total_bytes=1 << 62))
