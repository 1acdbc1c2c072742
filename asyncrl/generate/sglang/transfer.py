"""How weights get from this process into one SGLang server of the same node, without disk and without a copy over HTTP.

The newest weights lie in memory that other processes can map (asyncrl.models.memory). A server gets a few hundred bytes per
tensor over HTTP: a pickle, since SGLang's /update_weights_from_tensor reads nothing else, whose calls (torch functions, which
its unpickler allows) map this memory read-only and cut the tensors out of it. torch's own sharing is not used: its
`file_system` strategy needs a daemon, and keeps a segment for ever whose payload no server has opened.
"""

import asyncio
import base64
import functools
import pickle
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch

from asyncrl.interfaces import Tensors
from asyncrl.models.layout import DTYPES, TensorSpec
from asyncrl.models.memory import HEAD_BYTES, FlatTensors, WeightMemory
from asyncrl.types import Version

# POST of a JSON body to a path of one server. Raises Unavailable if it is gone, silent for too long, or says success: false.
Post = Callable[[str, dict[str, Any]], Awaitable[Any]]

BUCKET_BYTES = 512 << 20  # a server with a GPU holds one bucket beside its weights


class StagedWeights:
    """The newest weights of this generator, for servers that take them now or when they come up.

    Used by one thread at a time. Whoever sends waits for every answer before the next `put`, for a server opens the memory
    by its path; a server whose send failed must take a whole send before it serves again.
    """

    def __init__(self) -> None:
        self.version: Version | None = None
        self._tensors: FlatTensors | None = None

    def put(self, version: Version, tensors: Tensors) -> None:
        """Keeps the tensors of a version that came over the bus; of others, from any device, a copy.

        Blocks until they are copied. Raises ConfigError if there is not enough memory; then nothing is staged.
        """
        self.close()
        self._tensors = tensors if isinstance(tensors, FlatTensors) else FlatTensors.copy_of(tensors, f"weights {version}")
        self.version = version

    @property
    def tensors(self) -> FlatTensors:
        """Raises ValueError if there are none."""
        if not self._tensors:
            raise ValueError("no whole version is staged: nothing can be sent; `put` weights first")
        return self._tensors

    def buckets(self, bucket_bytes: int) -> Iterator[tuple[list[TensorSpec], dict[str, str]]]:
        """Neighbouring tensors in buckets of at most bucket_bytes; a larger tensor has a bucket of its own.

        With each bucket come the fields that label the server's weights: none but for the last.
        """
        plan: list[list[TensorSpec]] = []
        start = end = 0
        for spec in self.tensors.specs:
            start, end = min(start, spec.offset), max(end, spec.end)
            if not plan or end - start > bucket_bytes:
                plan.append([])
                start, end = spec.offset, spec.end
            plan[-1].append(spec)
        for specs in plan:
            yield specs, ({"weight_version": str(self.version)} if specs is plan[-1] else {})

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self.version = self._tensors = None


class Transfer(Protocol):
    """One server's way in. Names are those of the Hugging Face checkpoint; SGLang maps them to its own.

    With several buckets a server has mixed weights meanwhile: pause it, or leave it without requests, around `send`.
    """

    async def open(self, post: Post) -> None:
        """Called before the first `send` to a new or restarted server. Raises Unavailable."""

    async def send(self, post: Post, staged: StagedWeights) -> None:
        """Waits until the server has taken all buckets; its label changes to the staged version with the last one only.

        Raises Unavailable; the server's weights are then undefined until a whole send succeeds.
        """

    async def close(self) -> None:
        """Releases this side's resources. Idempotent."""


class SharedMemory:
    """A server on this node maps the weights, or (device cuda) one bucket of them on this process's GPU, over CUDA IPC.

    Each of the server's tp_size ranks reads for itself. If it can't, for it is in another container or of another user, SGLang
    dies of it: use `Distributed` there.
    """

    def __init__(self, tp_size: int, device: Literal["cpu", "cuda"] = "cpu", *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._tp_size, self._device, self._bucket_bytes = tp_size, device, bucket_bytes
        self._on_gpu: list[torch.Tensor] = []

    async def open(self, post: Post) -> None:
        """Does nothing: a server opens what it needs with each payload."""

    async def send(self, post: Post, staged: StagedWeights) -> None:
        memory = staged.tensors.memory
        for number, (specs, label) in enumerate(staged.buckets(self._bucket_bytes)):
            if self._device == "cpu":
                payloads = [_payload(_mapping(memory), 0, specs)] * self._tp_size
            else:
                payloads = await asyncio.to_thread(self._export, memory.flat, number, specs)
            await post("/update_weights_from_tensor", {"serialized_named_tensors": payloads, "flush_cache": False, **label})

    async def close(self) -> None:
        self._on_gpu = []

    def _export(self, flat: torch.Tensor, number: int, specs: Sequence[TensorSpec]) -> list[str]:
        """Copies one bucket to the GPU; a payload per rank, since torch counts the readers of each handle."""
        start, end = min(spec.offset for spec in specs), max(spec.end for spec in specs)
        # Two buffers by turns: a server answers when its copy is queued on its own stream, not when it is done.
        if len(self._on_gpu) < 2 or any(buffer.numel() < end - start for buffer in self._on_gpu):
            size = max(self._bucket_bytes, end - start)
            self._on_gpu = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        buffer = self._on_gpu[number % 2]
        buffer[: end - start].copy_(flat[start:end])
        torch.cuda.synchronize()
        return [_payload(_cuda_handle(buffer), start, specs) for _ in range(self._tp_size)]


class _Call:
    """Pickles as a call that whoever unpickles it makes; an instance used twice is called once."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._function, self._arguments


def _payload(base: _Call, start: int, specs: Sequence[TensorSpec]) -> str:
    """[(name, tensor), …] for SGLang's MultiprocessingSerializer: base64 of a pickle. `base` begins at byte `start`."""
    named = []
    for spec in specs:
        raw = _Call(torch.narrow, base, 0, spec.offset - start, spec.nbytes)
        named.append((spec.name, _Call(torch.reshape, _Call(torch.Tensor.view, raw, DTYPES[spec.dtype]), spec.shape)))
    return base64.b64encode(pickle.dumps(named, protocol=4)).decode()


def _mapping(memory: WeightMemory) -> _Call:
    """What a process that may look into this one (same user and PID namespace) calls to see all the bytes, uint8."""
    # A private mapping: the file is opened read-only, and must be there and large enough, or the call fails.
    path, token = memory.place.path, memory.place.token
    mapped = _Call(functools.partial(torch.from_file, dtype=torch.uint8), path, False, HEAD_BYTES + memory.nbytes)
    # In a container the same path may be another process's file: never take that for weights.
    begins = _Call(torch.narrow, mapped, 0, 0, len(token))
    ours = _Call(torch.equal, begins, _Call(functools.partial(torch.tensor, dtype=torch.uint8), list(token)))
    checked = _Call(torch._assert, ours, f"{path} is not the memory of asyncrl: use engine.sglang.transfer: distributed")
    whole = _Call(tuple.__getitem__, (mapped, checked), 0)
    return _Call(torch.narrow, whole, 0, HEAD_BYTES, memory.nbytes)


def _cuda_handle(buffer: torch.Tensor) -> _Call:
    """What another process calls to see a tensor of this one's GPU. SGLang finds the GPU by its UUID, as index 6 says."""
    from torch.multiprocessing.reductions import reduce_tensor

    rebuild, arguments = reduce_tensor(buffer)
    uuid = str(torch.cuda.get_device_properties(arguments[6]).uuid)
    return _Call(rebuild, *arguments[:6], uuid, *arguments[7:])
