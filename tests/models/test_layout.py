import hashlib
import itertools

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.models import layout
from asyncrl.models.layout import DTYPES, TensorSpec, cast, lay_out, parts, runs, total_bytes


def flat(specs: tuple[TensorSpec, ...], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    data = torch.zeros(total_bytes(specs), dtype=torch.uint8)
    for spec in specs:
        for offset, run in runs(spec, cast(spec, tensors[spec.name].detach()), (0,) * len(spec.shape)) if spec.nbytes else ():
            data[offset : offset + len(run)] = torch.frombuffer(run, dtype=torch.uint8)
    return data


def round_trip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    specs = lay_out(tensors)
    data = flat(specs, tensors)
    return {
        spec.name: spec.view(data)
        for spec in msgspec.msgpack.decode(msgspec.msgpack.encode(specs), type=tuple[TensorSpec, ...])
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    tensors = {}
    for index in range(draw(st.integers(0, 5))):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        count = torch.empty(shape).numel() * dtype.itemsize
        raw = torch.frombuffer(bytearray(draw(st.binary(min_size=count, max_size=count)) or b"\0"), dtype=torch.uint8)[:count]
        if dtype == torch.bool:
            raw = raw & 1
        tensors[f"layer.{index}"] = raw.view(dtype).reshape(shape)
    return tensors


@settings(deadline=None, max_examples=150)
@given(state_dicts())
def test_any_state_dict_comes_back_to_the_byte(tensors: dict[str, torch.Tensor]) -> None:
    found = round_trip(tensors)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert digest(found[name]) == digest(tensor)


def test_layout_by_hand() -> None:
    tensors = {"a": torch.zeros(5), "b": torch.tensor(7, dtype=torch.int64), "e": torch.empty(0, 2)}
    specs = lay_out(tensors)
    assert specs == (
        TensorSpec("a", "float32", (5,), 0),  # bytes 0..19
        TensorSpec("b", "int64", (), 64),  # the next multiple of 64
        TensorSpec("e", "float32", (0, 2), 0),
    )
    assert total_bytes(specs) == 72


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), max_size=3), st.sampled_from(["float32", "bfloat16"]))
def test_blocks_of_a_tensor_cut_anyhow_make_it_up(sizes: list[list[int]], dtype: str) -> None:
    """sizes: of the blocks along each dimension."""
    whole = torch.randn([sum(of) for of in sizes])
    spec = TensorSpec("w", dtype, tuple(whole.shape), 64)
    data = torch.zeros(spec.end, dtype=torch.uint8)
    starts = [list(itertools.accumulate(of, initial=0)) for of in sizes]
    for index in itertools.product(*(range(len(of)) for of in sizes)):
        offsets = [start[at] for start, at in zip(starts, index, strict=True)]
        block = whole[tuple(slice(start[at], start[at + 1]) for start, at in zip(starts, index, strict=True))]
        for offset, run in runs(spec, cast(spec, block), offsets):
            data[offset : offset + len(run)] = torch.frombuffer(run, dtype=torch.uint8)
    assert torch.equal(spec.view(data), whole.to(DTYPES[dtype]))


def test_parts_are_cut_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PART_BYTES", 20)  # two rows of 10 bytes in the spec's dtype
    spec, block = TensorSpec("w", "bfloat16", (9, 5), 0), torch.randn(7, 5)
    found = list(parts(spec, block))
    assert [(row, len(part)) for row, part in found] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    assert torch.equal(torch.cat([part for _, part in found]), block)
    assert [(row, part.shape) for row, part in parts(TensorSpec("s", "float32", (), 0), torch.tensor(1.0))] == [(0, (1,))]


def test_tied_tensors_travel_once_and_arrive_tied() -> None:
    shared = torch.randn(4, 4)
    tensors = {"embed": shared, "norm": torch.ones(2), "head": shared}
    assert total_bytes(lay_out(tensors)) == 64 + 8
    found = round_trip(tensors)
    assert torch.equal(found["head"], shared)
    assert found["head"].data_ptr() == found["embed"].data_ptr()


def test_a_transposed_view_arrives_as_its_values_not_its_memory() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    tensors = {"w": matrix, "w_t": matrix.T, "grad": torch.ones(2, requires_grad=True)}
    found = round_trip(tensors)
    assert found["w_t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["grad"].tolist() == [1, 1]


def test_a_dtype_without_plain_bytes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer\.q: dtype float4_e2m1fn_x2"):
        lay_out({"layer.q": torch.empty(2, dtype=torch.float4_e2m1fn_x2)})
