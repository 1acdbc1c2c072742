"""Weights in memory that other processes of this node map instead of copying.

The memory has no name (memfd_create): the kernel frees it when the last process that uses it ends, however it ends. So there
is nothing to unlink or to sweep, and the size of /dev/shm (64 MB in a docker container) is no bound. It is sealed once it is
written: from then on no process can change it, its maker included, so what a reader has verified stays as it is, and models use
it where it lies.

Why not multiprocessing.shared_memory: its resource tracker unlinks a segment when *any* process that attached to it exits.
"""

import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from msgspec import Struct

from asyncrl.errors import ConfigError
from asyncrl.interfaces import Tensors
from asyncrl.models.layout import ALIGN, TensorSpec, cast, lay_out, parts, runs, total_bytes
from asyncrl.models.room import available_bytes

HEAD_BYTES = ALIGN  # before the tensors: the token, and room, so that they stay aligned
_TOKEN_BYTES = 16
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Place(Struct, frozen=True):
    """Where memory can be opened: by processes of the same user for which `here()` is the same."""

    here: str
    path: str
    token: bytes  # the memory begins with it; a path may meanwhile lead to other memory


def here() -> str:
    """The same for all processes that see each other under /proc: one booted machine, one PID namespace."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


class WeightMemory:
    """`nbytes` bytes that other processes can open by their `place`.

    The file descriptor goes with the last reference, or with `close`; a mapping that somebody still reads stays valid.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes over `fd`. Use `create` or `open`."""
        self.nbytes = nbytes
        self.close = weakref.finalize(self, os.close, fd)
        self._fd = fd
        self.place = Place(here(), f"/proc/{os.getpid()}/fd/{fd}", os.pread(fd, _TOKEN_BYTES, 0))

    @classmethod
    def create(cls, nbytes: int, what: str) -> "WeightMemory":
        """Makes new memory for `what`. Raises ConfigError if the machine, or a cgroup of this process, has not enough."""
        size = HEAD_BYTES + nbytes
        if size > (available := available_bytes()):  # a memfd has no bound: the kernel would kill processes instead
            raise ConfigError(
                f"{what} need {size:,} bytes of memory, and this process has {available:,} left, so they can't be taken here; "
                "give this node (or container) more memory, or place fewer generators on it"
            )
        fd = os.memfd_create("asyncrl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        os.pwrite(fd, secrets.token_bytes(_TOKEN_BYTES), 0)
        return cls(fd, nbytes)

    @classmethod
    def open(cls, place: Place, nbytes: int, *, sealed: bool = True) -> "WeightMemory | None":
        """Opens another process's memory; returns None if it isn't there for us (gone, or another user's).

        sealed: only if it is; else only if it is not yet, to `write` there too. Its maker seals it.
        """
        mode, seals = (os.O_RDONLY, _SEALS) if sealed else (os.O_RDWR, 0)
        try:
            # The path may by now lead to anything: a pipe must not block us, nor a terminal become ours.
            fd = os.open(place.path, mode | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError):  # a path with a zero in it is a ValueError
            return None
        try:
            as_expected = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == seals  # the kernel may add others
        except OSError:  # a file of another kind
            as_expected = False
        found = os.fstat(fd)
        ours = found.st_uid == os.geteuid() and found.st_size == HEAD_BYTES + nbytes
        if as_expected and ours and os.pread(fd, _TOKEN_BYTES, 0) == place.token:
            return cls(fd, nbytes)
        os.close(fd)
        return None

    @cached_property
    def flat(self) -> torch.Tensor:
        """All bytes, uint8, [nbytes], mapped at the first call; later writes show. What its user changes stays private."""
        mapped = mmap.mmap(self._fd, HEAD_BYTES + self.nbytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=torch.uint8)[HEAD_BYTES:]

    @cached_property
    def bytes(self) -> memoryview:
        """The same as a memoryview."""
        return memoryview(self.flat.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers before 3.12

    def write(self, offset: int, data: memoryview) -> None:
        """Copies `data` to byte `offset`. Raises PermissionError once the memory is sealed."""
        # pwrite and not a writable map: that would first fill every new page with zeros, and can't be sealed.
        while data:
            written = os.pwrite(self._fd, data, HEAD_BYTES + offset)
            data, offset = data[written:], offset + written

    def read(self, offset: int, into: memoryview) -> None:
        """Fills `into` with what lies from byte `offset` on, whatever users of mappings changed for themselves. Raises OSError
        if there is less."""
        while into:
            if not (count := os.preadv(self._fd, [into], HEAD_BYTES + offset)):
                raise OSError(f"{len(into)} bytes at {offset} are not there, of {self.nbytes}")
            into, offset = into[count:], offset + count

    def put(self, spec: TensorSpec, block: torch.Tensor, offsets: Sequence[int]) -> None:
        """Writes a block of a tensor, in which it stands from `offsets` on, cast to the spec's dtype. It must not be empty."""
        for row, part in parts(spec, block):
            self.put_part(spec, cast(spec, part), offsets, row)

    def put_part(self, spec: TensorSpec, part: torch.Tensor, offsets: Sequence[int], row: int) -> None:
        """Writes what `cast` made of a part, which begins at this row of a block."""
        for offset, data in runs(spec, part, (offsets[0] + row, *offsets[1:]) if offsets else ()):
            self.write(offset, data)

    def seal(self) -> None:
        """Makes the memory immutable for every process, and so fit to be opened by others."""
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)


class FlatTensors(dict[str, torch.Tensor]):
    """Tensors by name, which are views into one sealed memory, where they lie as `specs` say; it lasts as long as they do."""

    def __init__(self, specs: tuple[TensorSpec, ...], memory: WeightMemory) -> None:
        super().__init__((spec.name, spec.view(memory.flat)) for spec in specs)
        self.specs, self.memory = specs, memory

    @classmethod
    def copy_of(cls, tensors: Tensors, what: str) -> "FlatTensors":
        """Copies tensors from any device into new, sealed memory. Blocks until that is done.

        Raises ConfigError (not enough memory for `what`), ValueError (a dtype without plain bytes).
        """
        specs = lay_out(tensors)
        memory = WeightMemory.create(total_bytes(specs), what)
        end = 0
        for spec in specs:
            if spec.end > end:  # of tied ones the first
                end = spec.end
                memory.put(spec, tensors[spec.name].detach(), (0,) * len(spec.shape))
        memory.seal()
        return cls(specs, memory)
