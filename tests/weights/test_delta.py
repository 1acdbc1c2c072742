"""The codec alone: what it finds changed, and that nothing but the right version ever comes of it."""

import errno
import random
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl.errors import BadTransfer
from asyncrl.models.layout import DTYPES, lay_out
from asyncrl.models.memory import FlatTensors, WeightMemory
from asyncrl.weights import delta
from asyncrl.weights.delta import BLOCK_BYTES, Delta, apply_deltas, encode_delta

Names = st.sampled_from(sorted(set(DTYPES) - {"bool"}))
Layers = st.lists(st.tuples(Names, st.integers(0, 700), st.sampled_from([0, 0.003, 0.05, 0.3, 1])), min_size=1, max_size=6)
everywhere = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))


def flat(tensors: dict[str, torch.Tensor]) -> FlatTensors:
    return FlatTensors.copy_of(tensors, "weights")


def any_bits(dtype: str, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Of any kind: NaNs with any payload, infinities, both zeros."""
    raw = rng.integers(0, 256, max(1, count) * DTYPES[dtype].itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(DTYPES[dtype])[:count]


def applied(base: FlatTensors, *deltas: bytes) -> bytes:
    made = WeightMemory.create(base.memory.nbytes, "weights")
    apply_deltas(base.memory, [memoryview(data) for data in deltas], made)
    made.seal()
    return bytes(made.bytes)


def changed(tensors: dict[str, torch.Tensor], shares: list[float], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The same with a share of the elements of each overwritten by any bits."""
    new = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor, share in zip(new.values(), shares, strict=True):
        where = torch.from_numpy(np.flatnonzero(rng.random(len(tensor)) < share))
        raw, bits = tensor.view(torch.uint8), any_bits(str(tensor.dtype)[6:], len(where), rng)
        raw.view(-1, tensor.itemsize)[where] = bits.view(torch.uint8).view(-1, tensor.itemsize)
    return new


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors are cut by their borders."""
    monkeypatch.setattr(delta, "BLOCK_BYTES", 1024)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "PAYS", 2.0)


@everywhere
@given(Layers, st.integers(0, 1 << 30))
def test_any_change_of_any_bits_is_found_and_may_be_repeated(always: None, layers: list[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = [share for _, _, share in layers]
    versions = [{f"{i}": any_bits(dtype, count, rng) for i, (dtype, count, _) in enumerate(layers)}]
    versions += [changed(versions[0], shares, rng)]
    versions += [changed(versions[1], shares, rng)]
    first, second, third = (flat(tensors) for tensors in versions)
    one, two = (encode_delta(a.memory, b.memory, a.specs) for a, b in ((first, second), (second, third)))
    assert one is not None
    assert two is not None
    assert applied(first, one) == bytes(second.memory.bytes)
    assert applied(second, one) == bytes(second.memory.bytes)  # once more
    assert applied(first, one, one) == bytes(second.memory.bytes)
    assert applied(first, one, two) == applied(second, two) == bytes(third.memory.bytes)


@everywhere
@given(st.integers(1, 2000), st.integers(0, 1 << 30))
def test_another_base_is_noticed_wherever_it_differs(always: None, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = {"w": any_bits("bfloat16", count, rng)}
    base, new = flat(old), flat(changed(old, [0.05], rng))
    made = encode_delta(base.memory, new.memory, base.specs)
    assert made is not None
    same = new["w"].view(torch.int16) == base["w"].view(torch.int16)  # what the delta doesn't overwrite
    for at in np.flatnonzero(same)[:3]:
        wrong = {"w": old["w"].clone()}
        wrong["w"].view(torch.int16)[at] ^= 1
        with pytest.raises(BadTransfer, match="made against other weights"):
            applied(flat(wrong), made)


@everywhere
@given(st.lists(st.integers(0, 3000), max_size=40, unique=True), st.sampled_from([1000, 70_000, 300_000]))
def test_positions_come_back_however_far_they_lie_apart(where: list[int], spread: int) -> None:
    changed_at = np.zeros(spread, bool)
    changed_at[[at * spread // 3001 for at in where]] = True
    found = np.flatnonzero(changed_at)
    coding, positions = delta._shortest(changed_at, found)
    values = np.arange(1, len(found) + 1, dtype=np.uint16)
    block, nothing = np.zeros(spread * 2, np.uint8), np.zeros(spread, np.uint16)
    delta._overwrite(block, delta.Part(0, spread, 2, coding, delta._pack(positions), delta._pack(delta._planes(values))))
    nothing[found] = values
    assert block.view(np.uint16).tolist() == nothing.tolist()


@pytest.mark.parametrize(
    ("share", "coding", "most"),
    [(1e-5, "uint16", 0.0002), (0.01, "uint8", 0.025), (0.2, "bitmap", 0.27), (0.99, "dense", 1.01)],
)
def test_the_shortest_coding_is_taken(
    always: None, monkeypatch: pytest.MonkeyPatch, share: float, coding: str, most: float
) -> None:
    monkeypatch.setattr(delta, "BLOCK_BYTES", BLOCK_BYTES)
    rng = np.random.default_rng(1)
    old = any_bits("bfloat16", 1 << 21, rng)
    new = old.view(torch.int16) ^ torch.from_numpy((rng.random(1 << 21) < share).astype(np.int16))
    before, after = flat({"w": old}), flat({"w": new.view(torch.bfloat16)})
    made = encode_delta(before.memory, after.memory, before.specs)
    assert made is not None
    (((part,),),) = [msgspec.msgpack.decode(made, type=Delta).blocks]
    assert part.coding == coding
    assert len(made) <= most * before.memory.nbytes
    assert applied(before, made) == bytes(after.memory.bytes)


def test_real_weights_take_two_bytes_and_a_half_for_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "BLOCK_BYTES", BLOCK_BYTES)
    generator = torch.Generator().manual_seed(0)
    old = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()
    step = (torch.rand(1 << 22, generator=generator) < 0.01).short()
    before, after = flat({"w": old}), flat({"w": (old.view(torch.int16) + step).view(torch.bfloat16)})
    made = encode_delta(before.memory, after.memory, before.specs)
    assert made is not None
    assert 2.3 < len(made) / int(step.sum()) < 2.75  # a byte of position, and 16 bits of which the higher half compress


def test_what_does_not_pay_is_not_made_and_nothing_changed_is_almost_nothing() -> None:
    old = {"a": torch.randn(5000), "norm": torch.randn(100)}
    before = flat(old)
    assert encode_delta(before.memory, flat({name: t + 1 for name, t in old.items()}).memory, before.specs) is None
    same = encode_delta(before.memory, flat(old).memory, before.specs)
    assert same is not None
    assert len(same) < 15 * -(-before.memory.nbytes // 1024)  # a checksum of each block
    assert applied(before, same) == bytes(before.memory.bytes)


def test_tied_and_empty_tensors_and_those_of_other_sizes_lie_as_they_do() -> None:
    matrix = torch.randn(700, 2).bfloat16()
    old = {"embed": matrix, "none": torch.empty(0, 3), "bias": torch.randn(3), "head": matrix, "scale": torch.tensor(1.5)}
    assert len({spec.offset for spec in lay_out(old)}) == 3  # embed and head at the same, as the empty one
    matrix2 = matrix.clone()
    matrix2[::50] = -0.0
    new = {**old, "embed": matrix2, "head": matrix2, "scale": torch.tensor(float("nan"))}
    before, after = flat(old), flat(new)
    made = encode_delta(before.memory, after.memory, before.specs)
    assert made is not None
    assert applied(before, made) == bytes(after.memory.bytes)


@pytest.fixture
def sound(small_blocks: None) -> tuple[FlatTensors, bytes, bytes]:
    rng = np.random.default_rng(3)
    old = {"w": any_bits("bfloat16", 3000, rng), "f": any_bits("float32", 300, rng)}
    before, after = flat(old), flat(changed(old, [0.1, 0.3], rng))
    made = encode_delta(before.memory, after.memory, before.specs)
    assert made is not None
    return before, made, bytes(after.memory.bytes)


def test_truncated_anywhere_it_is_refused(sound: tuple[FlatTensors, bytes, bytes]) -> None:
    base, made, _ = sound
    for end in range(0, len(made), 19):
        with pytest.raises(BadTransfer):
            applied(base, made[:end])


@pytest.mark.parametrize("seed", range(3))
def test_damaged_anywhere_it_is_refused_or_harmless(sound: tuple[FlatTensors, bytes, bytes], seed: int) -> None:
    base, made, expected = sound
    rng, refused = random.Random(seed), 0
    for _ in range(150):
        damaged = bytearray(made)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.choice([1, 1, 2])] = rng.choice([rng.randbytes(1), b"", b"\xff\xff", b"\xdd\xff\xff\xff\xff"])
        try:
            assert applied(base, bytes(damaged)) == expected
        except BadTransfer:
            refused += 1
    assert refused > 110


PARTS: list[Callable[[delta.Part], dict[str, Any]]] = [
    lambda part: {"start": part.start + 1024},
    lambda part: {"start": -2},
    lambda part: {"start": 1},
    lambda part: {"count": 1 << 62},
    lambda part: {"count": -1},
    lambda part: {"itemsize": 3},
    lambda part: {"itemsize": 0},
    lambda part: {"coding": "dense"},
    lambda part: {"coding": "uint16"},
    lambda part: {"values": delta.Packed(1 << 40, part.values.data)},
    lambda part: {"values": delta.Packed(-1, part.values.data)},
    lambda part: {"positions": delta.Packed(0, memoryview(b""))},
]


@pytest.mark.parametrize("change", PARTS)
def test_what_contradicts_itself_takes_no_memory_and_is_refused(
    sound: tuple[FlatTensors, bytes, bytes], change: Callable[[delta.Part], dict[str, Any]]
) -> None:
    base, made, _ = sound
    read = msgspec.msgpack.decode(made, type=Delta)
    part = read.blocks[0][0]
    blocks = ((msgspec.structs.replace(part, **change(part)), *read.blocks[0][1:]), *read.blocks[1:])
    with pytest.raises(BadTransfer):
        applied(base, msgspec.msgpack.encode(msgspec.structs.replace(read, blocks=blocks)))


def test_a_delta_of_other_weights_is_refused(sound: tuple[FlatTensors, bytes, bytes]) -> None:
    _, made, _ = sound
    with pytest.raises(BadTransfer, match="of 7216 bytes for a version of 400"):
        applied(flat({"w": torch.zeros(100)}), made)
    with pytest.raises(BadTransfer, match=r"block 0 of 8 .* made against other weights"):
        applied(flat({"w": torch.zeros(1804)}), made)


def test_what_is_given_up_is_no_delta() -> None:
    base = flat({"w": torch.zeros(2000)})
    enough = threading.Event()
    assert encode_delta(base.memory, base.memory, base.specs, enough) is not None
    enough.set()
    assert encode_delta(base.memory, base.memory, base.specs, enough) is None


def test_a_full_disk_is_no_damage(sound: tuple[FlatTensors, bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightMemory, "write", full)
    with pytest.raises(OSError, match="No space left"):
        apply_deltas(sound[0].memory, [memoryview(sound[1])], WeightMemory.create(sound[0].memory.nbytes, "weights"))
