"""The manifest: what it promises, and that one which contradicts itself is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncrl.errors import BadTransfer
from asyncrl.models.layout import TensorSpec, lay_out, total_bytes
from asyncrl.models.memory import Place
from asyncrl.types import Version
from asyncrl.weights.messages import Manifest, decode_reply, encode

V = Version(1, 1)


def manifest_of(tensors: dict[str, torch.Tensor], bucket_bytes: int = 100) -> Manifest:
    specs = lay_out(tensors)
    return Manifest(version=V, tensors=specs, total_bytes=total_bytes(specs), bucket_bytes=bucket_bytes).signed()


@given(st.integers(0, 1000), st.integers(1, 100))
def test_buckets_tile_the_bytes(total: int, bucket_bytes: int) -> None:
    manifest = manifest_of({"a": torch.zeros(total, dtype=torch.uint8)}, bucket_bytes)
    manifest.check()
    parts = [manifest.bucket(index) for index in range(manifest.bucket_count)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))


GOOD = manifest_of({"a": torch.zeros(50), "b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (replace(GOOD, total_bytes=1 << 60), "total_bytes"),
        (replace(GOOD, total_bytes=10), "total_bytes"),
        (replace(GOOD, bucket_bytes=0), "bucket_bytes=0"),
        (replace(GOOD, bucket_bytes=1 << 36), "bucket_bytes=68719476736"),
        (replace(GOOD, tensors=(*GOOD.tensors, TensorSpec("a", "float32", (1,), 0))), "named twice"),
        (replace(GOOD, tensors=(TensorSpec("a", "object", (50,), 0),)), "unknown dtype object"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (-1, -50), 0),)), "negative dimension"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (0, 1 << 40, 1 << 40), 0),)), "is of no tensor"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (1,) * 65, 0),)), "is of no tensor"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (50,), -64),)), "offset -64"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (50,), 2),)), "offset 2"),
        (replace(GOOD, tensors=(*GOOD.tensors, TensorSpec("c", "float32", (0,), 64))), "offset 64"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(damaged: Manifest, message: str) -> None:
    with pytest.raises(BadTransfer, match=message):
        damaged.signed().check()


def test_a_manifest_travels_unchanged() -> None:
    manifest = replace(GOOD, place=Place("here", "/proc/1/fd/2", b"token")).signed()
    assert decode_reply(encode(manifest)) == manifest
    manifest.check()


def test_a_manifest_that_was_changed_anywhere_is_refused() -> None:
    manifest = replace(GOOD, place=Place("here", "/proc/1/fd/2", b"token")).signed()
    other_size = replace(manifest, bucket_bytes=101)  # consistent, but not what was signed
    other_name = replace(manifest, tensors=(replace(manifest.tensors[0], name="A"), *manifest.tensors[1:]))
    replace(manifest, place=Place("here", "/proc/1/fd/3", b"token")).check()  # who passes a version on has its own
    for changed in (
        other_size,
        other_name,
        replace(manifest, version=Version(1, 2)),
        replace(manifest, own_checksum=0),
    ):
        with pytest.raises(BadTransfer, match="its checksum doesn't match"):
            changed.check()


def test_a_bucket_passes_for_no_other_one_nor_for_one_of_another_version() -> None:
    manifests = [GOOD, replace(GOOD, version=Version(1, 2)).signed()]
    sums = [manifest.checksum(index, memoryview(b"same")) for manifest in manifests for index in range(3)]
    assert len({*sums}) == 6
    assert GOOD.checksum(0, memoryview(b"same")) == sums[0]
