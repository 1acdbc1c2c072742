"""One version while it is being received: which buckets are there, which were asked for, which are sound."""

import time
from collections.abc import Callable

import torch

from asyncrl.errors import BadTransfer
from asyncrl.types import Version
from asyncrl.weights import layout as codec
from asyncrl.weights import shm
from asyncrl.weights.messages import Manifest


class Assembly:
    """Collects the buckets of one manifest into `data` (flat uint8, [total_bytes]).

    Every bucket is verified after it was copied, so a later change at its source can't matter. Raises BadTransfer for a
    manifest that contradicts itself and for bytes that don't match their checksum; then the whole assembly is worthless.
    """

    def __init__(self, manifest: Manifest, buffer: torch.Tensor | None = None) -> None:
        """Reuses `buffer` if it has the right size: then tensors made from it before become invalid."""
        codec.check(manifest)
        if buffer is None or len(buffer) != manifest.total_bytes:
            buffer = torch.empty(manifest.total_bytes, dtype=torch.uint8)
        self.manifest, self.data = manifest, buffer
        self.begun_at = time.monotonic()
        self._bytes = codec.as_bytes(buffer)
        self._missing = set(range(len(manifest.checksums)))
        self._asked: dict[int, int] = {}  # bucket -> number of the last Hello sent before asking
        self._unasked = list(reversed(range(len(manifest.checksums))))

    @property
    def version(self) -> Version:
        return self.manifest.version

    @property
    def whole(self) -> bool:
        return not self._missing

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views into `data`. Only of a whole assembly."""
        if self._missing:
            raise BadTransfer(f"weights {self.version}: {len(self._missing)} buckets are missing; not shown")
        return codec.views(self.manifest, self.data)

    def ask(self, credit: int, hello: int) -> list[int]:
        """The buckets to ask for now, so that at most `credit` are outstanding. hello: number of the last Hello."""
        asked = []
        while self._unasked and len(self._asked) < credit:
            index = self._unasked.pop()
            if index in self._missing:  # it may have come although it was taken for dropped
                self._asked[index] = hello
                asked.append(index)
        return asked

    def answered(self, hello: int) -> int:
        """Hello number `hello` was answered: what was asked before it and isn't here was dropped. Returns how many."""
        dropped = [index for index, before in self._asked.items() if before < hello]
        for index in dropped:
            del self._asked[index]
        self._unasked.extend(dropped)
        return len(dropped)

    def put(self, index: int, payload: memoryview) -> None:
        """Takes one bucket from the wire. A bucket that is already there is ignored."""
        if index not in self._missing:
            return
        window = self._window(index)
        if len(payload) != len(window):
            raise BadTransfer(
                f"weights {self.version}, bucket {index}: {len(payload)} bytes, expected {len(window)}; not shown"
            )
        window[:] = payload
        self._asked.pop(index, None)
        self._verify(index, window)

    def read(self, fd: int, stop: Callable[[], bool]) -> int:
        """Takes buckets from a file in shared memory, one at least, until `stop` says so. Returns the bytes read."""
        total = 0
        for index in sorted(self._missing):
            window = self._window(index)
            count = shm.read_into(fd, window, index * self.manifest.bucket_bytes)
            if count != len(window):
                raise BadTransfer(f"weights {self.version}, bucket {index}: the shared file ends early; not shown")
            self._verify(index, window)
            total += count
            if stop():
                break
        return total

    def _window(self, index: int) -> memoryview:
        return self._bytes[codec.bucket_slice(index, self.manifest.total_bytes, self.manifest.bucket_bytes)]

    def _verify(self, index: int, window: memoryview) -> None:
        found, expected = codec.checksum(window), self.manifest.checksums[index]
        if found != expected:
            raise BadTransfer(
                f"weights {self.version}, bucket {index}: checksum {found:08x}, manifest says {expected:08x}; not shown"
            )
        self._missing.discard(index)
