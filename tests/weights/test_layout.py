import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncrl.errors import BadTransfer
from asyncrl.types import Version
from asyncrl.weights import layout as codec
from asyncrl.weights.messages import Manifest, TensorSpec, decode_reply, encode

V = Version(1, 1)


def manifest_of(tensors: dict[str, torch.Tensor], bucket_bytes: int = 100) -> Manifest:
    specs, total = codec.plan(tensors)
    sums = (0,) * codec.bucket_count(total, bucket_bytes)
    return Manifest(version=V, tensors=specs, total_bytes=total, bucket_bytes=bucket_bytes, checksums=sums)


def flat(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    data = torch.zeros(manifest.total_bytes, dtype=torch.uint8)
    for offset, piece in codec.pieces(manifest.tensors, tensors):
        data[offset : offset + len(piece)] = piece
    return data


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(codec.as_bytes(tensor.contiguous().reshape(-1).view(torch.uint8)))).hexdigest()


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    tensors = {}
    for index in range(draw(st.integers(0, 5))):
        dtype = codec.DTYPES[draw(st.sampled_from(sorted(codec.DTYPES)))]
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        count = torch.empty(shape).numel() * dtype.itemsize
        raw = torch.frombuffer(bytearray(draw(st.binary(min_size=count, max_size=count)) or b"\0"), dtype=torch.uint8)[:count]
        if dtype == torch.bool:
            raw = raw & 1
        tensors[f"layer.{index}"] = raw.view(dtype).reshape(shape)
    return tensors


@settings(deadline=None, max_examples=150)
@given(state_dicts(), st.integers(1, 200))
def test_any_state_dict_comes_back_to_the_byte(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> None:
    manifest = decode_reply(encode(manifest_of(tensors, bucket_bytes)))
    assert isinstance(manifest, Manifest)
    codec.check(manifest)
    found = codec.views(manifest, flat(manifest, tensors))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert digest(found[name]) == digest(tensor)


@given(st.integers(0, 1000), st.integers(1, 100))
def test_buckets_tile_the_bytes(total: int, bucket_bytes: int) -> None:
    parts = [codec.bucket_slice(i, total, bucket_bytes) for i in range(codec.bucket_count(total, bucket_bytes))]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))


def test_layout_by_hand() -> None:
    tensors = {"a": torch.zeros(5), "b": torch.tensor(7, dtype=torch.int64), "e": torch.empty(0, 2)}
    specs, total = codec.plan(tensors)
    assert specs == (
        TensorSpec("a", "float32", (5,), 0),  # bytes 0..19
        TensorSpec("b", "int64", (), 64),  # the next multiple of 64
        TensorSpec("e", "float32", (0, 2), 0),
    )
    assert total == 72


def test_tied_tensors_travel_once_and_arrive_tied() -> None:
    shared = torch.randn(4, 4)
    tensors = {"embed": shared, "norm": torch.ones(2), "head": shared}
    manifest = manifest_of(tensors)
    assert manifest.total_bytes == 64 + 8
    found = codec.views(manifest, flat(manifest, tensors))
    assert torch.equal(found["head"], shared)
    assert found["head"].data_ptr() == found["embed"].data_ptr()


def test_a_transposed_view_arrives_as_its_values_not_its_memory() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    tensors = {"w": matrix, "w_t": matrix.T, "grad": torch.ones(2, requires_grad=True)}
    manifest = manifest_of(tensors)
    found = codec.views(manifest, flat(manifest, tensors))
    assert found["w_t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["grad"].tolist() == [1, 1]


def test_a_dtype_without_plain_bytes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer\.q: dtype float4_e2m1fn_x2"):
        codec.plan({"layer.q": torch.empty(2, dtype=torch.float4_e2m1fn_x2)})


GOOD = manifest_of({"a": torch.zeros(50), "b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (replace(GOOD, total_bytes=1 << 60), "total_bytes"),
        (replace(GOOD, total_bytes=10), "total_bytes"),
        (replace(GOOD, checksums=(1,)), "1 checksums for 3 buckets"),
        (replace(GOOD, bucket_bytes=0), "bucket_bytes=0"),
        (replace(GOOD, tensors=(*GOOD.tensors, TensorSpec("a", "float32", (1,), 0))), "named twice"),
        (replace(GOOD, tensors=(TensorSpec("a", "object", (50,), 0),)), "unknown dtype object"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (-1, -50), 0),)), "negative dimension"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (50,), -64),)), "offset -64"),
        (replace(GOOD, tensors=(TensorSpec("a", "float32", (50,), 2),)), "offset 2"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(damaged: Manifest, message: str) -> None:
    with pytest.raises(BadTransfer, match=message):
        codec.check(damaged)
