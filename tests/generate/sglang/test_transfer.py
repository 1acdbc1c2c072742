"""Weights for a server of this node: what a payload says, who reads which memory, and when that memory goes."""

import asyncio
import base64
import io
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.transfer import SharedMemory, StagedWeights
from asyncrl.models.memory import FlatTensors
from asyncrl.types import Version

ONE, TWO = Version(1, 1), Version(1, 2)

READER = """
import base64, pickle, sys
named = dict(pickle.loads(base64.b64decode(sys.stdin.read())))
print({name: tensor.tolist() for name, tensor in named.items()})
named["a"].fill_(-1.0)
"""


def buckets(staged: StagedWeights, bucket_bytes: int) -> list[list[tuple[str, torch.Tensor]]]:
    return [[(spec.name, staged.tensors[spec.name]) for spec in specs] for specs, _ in staged.buckets(bucket_bytes)]


@pytest.fixture
def staged() -> Iterator[StagedWeights]:
    staged = StagedWeights()
    yield staged
    staged.close()


class RecordingPost:
    """A server that takes everything, or is lost at its n-th call."""

    def __init__(self, lost_at: int | None = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._lost_at = lost_at

    async def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if len(self.bodies) == self._lost_at:
            raise Unavailable("gone")
        self.bodies.append(body)
        return {"success": True}


class AllowedUnpickler(pickle.Unpickler):
    """Finds what SGLang 0.5.20's SafeUnpickler finds, of the modules that a payload for CPU may need."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module + ".").startswith(("builtins.", "functools.", "torch.")), f"{module}.{name} would be refused"
        assert (module, name) not in {("builtins", "eval"), ("builtins", "exec"), ("builtins", "compile")}
        return super().find_class(module, name)


def unpickled(payload: str) -> dict[str, torch.Tensor]:
    named = AllowedUnpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    return dict(named)


def payloads(staged: StagedWeights, **options: Any) -> list[str]:
    post = RecordingPost()
    asyncio.run(SharedMemory(1, **options).send(post, staged))
    return [body["serialized_named_tensors"][0] for body in post.bodies]


# ------------------------------------------------------------------------------------------------------------ staging


def test_neighbours_share_a_bucket_up_to_its_size_and_a_larger_tensor_has_one_alone(staged: StagedWeights) -> None:
    # 64 B each for a and b, 128 B for c, 8 B for d
    staged.put(ONE, {"a": torch.ones(16), "b": torch.ones(16), "c": torch.ones(32), "d": torch.ones(1, dtype=torch.int64)})
    names = [[name for name, _ in bucket] for bucket in buckets(staged, 128)]
    assert names == [["a", "b"], ["c"], ["d"]]
    assert [[name for name, _ in bucket] for bucket in buckets(staged, 1)] == [["a"], ["b"], ["c"], ["d"]]
    assert len(list(buckets(staged, 1 << 20))) == 1


def test_put_copies_and_leaves_what_somebody_still_holds_as_it_was(staged: StagedWeights) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(7, dtype=torch.int64)}
    staged.put(ONE, weights)
    weights["a"].fill_(-1.0)
    (first,) = buckets(staged, 1 << 20)
    assert dict(first)["a"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    staged.put(TWO, {"a": torch.full((3, 2), 9.0), "b": torch.tensor(8)})
    (second,) = buckets(staged, 1 << 20)
    assert dict(second)["a"].tolist() == [[9.0] * 2] * 3
    assert dict(second)["b"].item() == 8
    staged.put(TWO, {"a": torch.ones(3, 2, dtype=torch.bfloat16)})
    assert dict(first)["a"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert dict(first)["b"].item() == 7
    assert dict(second)["b"].item() == 8
    (second,) = buckets(staged, 1 << 20)
    assert [(name, tensor.dtype) for name, tensor in second] == [("a", torch.bfloat16)]


def test_weights_that_came_over_the_bus_are_not_copied(staged: StagedWeights) -> None:
    received = FlatTensors.copy_of({"a": torch.arange(3.0), "b": torch.tensor([True, False])}, "weights")
    staged.put(ONE, received)
    assert staged.tensors is received
    read = unpickled(payloads(staged)[0])
    assert read["a"].tolist() == [0.0, 1.0, 2.0]
    assert read["b"].tolist() == [True, False]
    memory = weakref.ref(received.memory)
    del received
    assert memory() is not None  # a server that comes up later reads it
    staged.put(TWO, {"a": torch.ones(2)})
    assert memory() is None


def test_tied_tensors_lie_once_and_arrive_under_both_names(staged: StagedWeights) -> None:
    shared = torch.arange(16.0)
    staged.put(ONE, {"embed": shared, "norm": torch.ones(16), "head": shared})
    assert staged.tensors.memory.nbytes == 128
    for bucket_bytes, count in ((1 << 20, 1), (64, 3)):
        sent = payloads(staged, bucket_bytes=bucket_bytes)
        read = {name: tensor.tolist() for payload in sent for name, tensor in unpickled(payload).items()}
        assert len(sent) == count
        assert read["head"] == read["embed"] == shared.tolist()
        assert read["norm"] == [1.0] * 16


def test_a_stage_without_a_whole_version_is_not_sent(staged: StagedWeights) -> None:
    with pytest.raises(ValueError, match="no whole version"):
        payloads(staged)
    staged.put(ONE, {"a": torch.ones(2)})

    with pytest.raises(RuntimeError):
        staged.put(TWO, {"a": torch.ones(2, device="meta")})
    assert staged.version is None
    with pytest.raises(ValueError, match="no whole version"):
        payloads(staged)


def test_more_than_the_machine_has_is_refused_with_the_size(staged: StagedWeights) -> None:
    with pytest.raises(ConfigError, match=r"weights 1\.1 need 18,014,398,509,482,048 bytes"):
        staged.put(ONE, {"a": torch.empty(1, device="meta").expand(1 << 52)})
    staged.put(ONE, {"a": torch.ones(2)})
    assert staged.version == ONE


def test_memory_goes_with_the_stage_and_leaves_no_file(descriptors: Callable[[], int]) -> None:
    fds = descriptors()
    staged = StagedWeights()
    for update in range(5):
        staged.put(Version(1, update), {"a": torch.ones(1000 + update)})
        assert len(payloads(staged)) == 1
        assert descriptors() == fds + 2  # the file, and its mapping's own descriptor
    assert [name for name in os.listdir("/dev/shm") if f"torch_{os.getpid()}" in name] == []
    staged.close()
    assert descriptors() == fds


# ------------------------------------------------------------------------------------------------------- shared memory

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(deadline=None, max_examples=50)
@given(layout=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6), bucket_bytes=st.integers(1, 2000))
def test_a_payload_gives_back_exactly_the_tensors(layout: list[tuple[tuple[int, ...], torch.dtype]], bucket_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{number}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(layout)
    }
    staged = StagedWeights()
    staged.put(ONE, tensors)
    read = {
        name: tensor for payload in payloads(staged, bucket_bytes=bucket_bytes) for name, tensor in unpickled(payload).items()
    }
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    staged.close()


def test_another_process_reads_the_weights_and_can_not_write_them(staged: StagedWeights) -> None:
    staged.put(ONE, {"a": torch.arange(3.0), "b": torch.tensor([True, False])})
    done = subprocess.run(
        [sys.executable, "-c", READER], input=payloads(staged)[0], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "{'a': [0.0, 1.0, 2.0], 'b': [True, False]}"
    (bucket,) = buckets(staged, 1 << 20)
    assert dict(bucket)["a"].tolist() == [0.0, 1.0, 2.0]


def test_memory_that_is_not_this_stages_is_never_taken_for_weights(staged: StagedWeights) -> None:
    staged.put(ONE, {"a": torch.ones(4)})
    (payload,) = payloads(staged)
    staged.put(TWO, {"a": torch.ones(8)})  # larger, and under the same descriptor: as in another PID namespace
    with pytest.raises(AssertionError, match="not the memory of asyncrl"):
        unpickled(payload)
    staged.close()
    with pytest.raises(RuntimeError):
        unpickled(payload)


def test_the_label_comes_with_the_last_bucket_and_each_rank_has_its_payload(staged: StagedWeights) -> None:
    staged.put(TWO, {name: torch.ones(16) for name in "abc"})
    post = RecordingPost()
    asyncio.run(SharedMemory(2, bucket_bytes=128).send(post, staged))
    assert [body.get("weight_version") for body in post.bodies] == [None, "1.2"]
    assert [body["flush_cache"] for body in post.bodies] == [False, False]
    assert [len(body["serialized_named_tensors"]) for body in post.bodies] == [2, 2]


def test_after_a_lost_server_the_next_one_takes_all_buckets(staged: StagedWeights) -> None:
    staged.put(ONE, {name: torch.ones(16) for name in "abc"})
    transfer = SharedMemory(1, bucket_bytes=64)
    with pytest.raises(Unavailable, match="gone"):
        asyncio.run(transfer.send(RecordingPost(lost_at=1), staged))
    post = RecordingPost()
    asyncio.run(transfer.send(post, staged))
    read = [unpickled(body["serialized_named_tensors"][0]) for body in post.bodies]
    assert [list(names) for names in read] == [["a"], ["b"], ["c"]]
