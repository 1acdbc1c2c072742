"""How weights get from this process into one SGLang server of the same node, without disk and without a copy over HTTP.

`Stage` holds the newest weights once, in memory without a name (memfd_create): the kernel frees it when the last process
that uses it ends, however it ends. So there is nothing to unlink, to count or to sweep, and the size of /dev/shm (64 MB in
a docker container) is no bound. A server gets a few hundred bytes per tensor over HTTP: a pickle, since SGLang's
/update_weights_from_tensor reads nothing else, whose calls (torch functions, which its unpickler allows) map this memory
read-only and cut the tensors out of it. torch's own sharing is not used: its `file_system` strategy needs a daemon, and
keeps a segment for ever whose payload no server has opened.
"""

import asyncio
import base64
import functools
import math
import mmap
import os
import pickle
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch

from asyncrl.errors import ConfigError
from asyncrl.interfaces import Tensors
from asyncrl.types import Version

# POST of a JSON body to a path of one server. Raises Unavailable if it is gone, silent for too long, or says success: false.
Post = Callable[[str, dict[str, Any]], Awaitable[Any]]

BUCKET_BYTES = 512 << 20  # a server with a GPU holds one bucket beside its weights
_ALIGN = 64  # bytes; a tensor of any dtype may begin at a multiple of it
_TOKEN_BYTES = 16


class Slot(NamedTuple):
    """Where one tensor lies in the buffer; offset and nbytes in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Stage:
    """The newest weights of this generator, in one flat CPU buffer that servers of this node can map.

    Of one thread at a time. No `put` while a server may still be reading: whoever sends waits for every answer first, and a
    server whose send failed must take a whole send before it serves again.
    """

    def __init__(self) -> None:
        self.version: Version | None = None
        self.slots: list[Slot] = []
        self._token = b""
        self._fd = -1
        self._flat = torch.empty(0, dtype=torch.uint8)

    def put(self, version: Version, tensors: Tensors) -> None:
        """Blocks until all tensors, of any device, are copied. Raises ConfigError if there is not enough memory."""
        self.version = None  # a half-written stage is never sent
        slots = _layout(tensors)
        if slots != self.slots:
            self._allocate(version, slots)
        for slot in slots:
            self.view(slot).copy_(tensors[slot.name])
        self.version = version

    def view(self, slot: Slot) -> torch.Tensor:
        """The tensor in this process, without a copy."""
        return self._flat[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)

    def plan(self, bucket_bytes: int) -> list[list[Slot]]:
        """Neighbouring tensors in buckets of at most bucket_bytes; a larger tensor has a bucket of its own."""
        plan: list[list[Slot]] = []
        for slot in self.slots:
            if not plan or slot.offset + slot.nbytes - plan[-1][0].offset > bucket_bytes:
                plan.append([])
            plan[-1].append(slot)
        return plan

    def flat(self, slots: Sequence[Slot]) -> torch.Tensor:
        """The bytes of neighbouring tensors, uint8, gaps included."""
        return self._flat[slots[0].offset : slots[-1].offset + slots[-1].nbytes]

    def mapping(self) -> "_Call":
        """What a process that may look into this one (same user and PID namespace) calls to see the whole buffer, uint8."""
        # A private mapping: the file is opened read-only, and must be there and large enough, or the call fails.
        path, nbytes = f"/proc/{os.getpid()}/fd/{self._fd}", self._flat.numel()
        mapped = _Call(functools.partial(torch.from_file, dtype=torch.uint8), path, False, nbytes)
        # In a container the same path may be another process's file: never take that for weights.
        token = _Call(torch.narrow, mapped, 0, 0, _TOKEN_BYTES)
        ours = _Call(torch.equal, token, _Call(functools.partial(torch.tensor, dtype=torch.uint8), list(self._token)))
        checked = _Call(torch._assert, ours, f"{path} is not the memory of asyncrl: use engine.sglang.transfer: distributed")
        return _Call(tuple.__getitem__, (mapped, checked), 0)

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self.version, self.slots = None, []
        self._flat = torch.empty(0, dtype=torch.uint8)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _allocate(self, version: Version, slots: list[Slot]) -> None:
        self.close()
        size = slots[-1].offset + max(slots[-1].nbytes, 1) if slots else _ALIGN
        if size > (available := available_bytes()):  # a memfd has no bound: the kernel would kill processes instead
            raise ConfigError(
                f"weights {version} need {size:,} bytes of shared memory, and this machine has {available:,} left: no SGLang "
                "server could take them; give the generator's node more memory"
            )
        self._fd = os.memfd_create("asyncrl-weights")
        os.ftruncate(self._fd, size)
        self._flat = torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._flat[:_TOKEN_BYTES] = torch.tensor(list(self._token), dtype=torch.uint8)
        self.slots = slots


class Transfer(Protocol):
    """One server's way in. Names are those of the Hugging Face checkpoint; SGLang maps them to its own.

    With several buckets a server has mixed weights meanwhile: pause it, or leave it without requests, around `send`.
    """

    async def open(self, post: Post) -> None:
        """Before the first `send` to a new or restarted server. Raises Unavailable."""

    async def send(self, post: Post, stage: Stage) -> None:
        """Waits until the server has taken all buckets; its label changes to str(stage.version) with the last one only.

        Raises Unavailable; the server's weights are then undefined until a whole send succeeds.
        """

    async def close(self) -> None:
        """Gives up this side's resources. Idempotent."""


class SharedMemory:
    """A server on this node maps the stage, or (device cuda) one bucket of it on this process's GPU, over CUDA IPC.

    Each of the server's tp_size ranks reads for itself. If it can't, for it is in another container or of another user, SGLang
    dies of it: use `Distributed` there.
    """

    def __init__(self, tp_size: int, device: Literal["cpu", "cuda"] = "cpu", *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._tp_size, self._device, self._bucket_bytes = tp_size, device, bucket_bytes
        self._on_gpu: list[torch.Tensor] = []

    async def open(self, post: Post) -> None:
        """Nothing to do: a server opens what it needs with each payload."""

    async def send(self, post: Post, stage: Stage) -> None:
        for number, (slots, label) in enumerate(labelled(stage, self._bucket_bytes)):
            if self._device == "cpu":
                payloads = [_payload(stage.mapping(), 0, slots)] * self._tp_size
            else:
                payloads = await asyncio.to_thread(self._export, stage.flat(slots), number, slots)
            await post("/update_weights_from_tensor", {"serialized_named_tensors": payloads, "flush_cache": False, **label})

    async def close(self) -> None:
        self._on_gpu = []

    def _export(self, flat: torch.Tensor, number: int, slots: Sequence[Slot]) -> list[str]:
        """Copies one bucket to the GPU; a payload per rank, since torch counts the readers of each handle."""
        # Two buffers by turns: a server answers when its copy is queued on its own stream, not when it is done.
        if len(self._on_gpu) < 2 or any(buffer.numel() < flat.numel() for buffer in self._on_gpu):
            size = max(self._bucket_bytes, flat.numel())
            self._on_gpu = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        buffer = self._on_gpu[number % 2]
        buffer[: flat.numel()].copy_(flat)
        torch.cuda.synchronize()
        return [_payload(_cuda_handle(buffer), slots[0].offset, slots) for _ in range(self._tp_size)]


def labelled(stage: Stage, bucket_bytes: int) -> Iterator[tuple[list[Slot], dict[str, str]]]:
    """The buckets of a stage, each with the fields that label the server's weights: none but for the last."""
    if stage.version is None or not stage.slots:
        raise ValueError("the stage holds no whole version: nothing can be sent; `put` weights first")
    plan = stage.plan(bucket_bytes)
    for slots in plan:
        yield slots, ({"weight_version": str(stage.version)} if slots is plan[-1] else {})


class _Call:
    """Pickles as a call that whoever unpickles it makes; an instance used twice is called once."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._function, self._arguments


def _payload(base: _Call, start: int, slots: Sequence[Slot]) -> str:
    """[(name, tensor), …] for SGLang's MultiprocessingSerializer: base64 of a pickle. `base` begins at byte `start`."""
    named = []
    for slot in slots:
        raw = _Call(torch.narrow, base, 0, slot.offset - start, slot.nbytes)
        named.append((slot.name, _Call(torch.reshape, _Call(torch.Tensor.view, raw, slot.dtype), slot.shape)))
    return base64.b64encode(pickle.dumps(named, protocol=4)).decode()


def _cuda_handle(buffer: torch.Tensor) -> _Call:
    """What another process calls to see a tensor of this one's GPU. SGLang finds the GPU by its UUID, as index 6 says."""
    from torch.multiprocessing.reductions import reduce_tensor

    rebuild, arguments = reduce_tensor(buffer)
    uuid = str(torch.cuda.get_device_properties(arguments[6]).uuid)
    return _Call(rebuild, *arguments[:6], uuid, *arguments[7:])


def available_bytes() -> int:
    """Memory that this machine can give without swapping."""
    with open("/proc/meminfo") as meminfo:
        kib = next(line.split()[1] for line in meminfo if line.startswith("MemAvailable:"))
    return int(kib) << 10


def _layout(tensors: Tensors) -> list[Slot]:
    slots, offset = [], _ALIGN  # the first bytes hold the token
    for name, tensor in tensors.items():
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        slots.append(Slot(name, tensor.dtype, tuple(tensor.shape), offset, nbytes))
        offset += -(-nbytes // _ALIGN) * _ALIGN
    return slots
