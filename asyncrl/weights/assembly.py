"""One version while it is being received: which buckets are there, which were asked for, which are sound."""

import time
from itertools import accumulate, pairwise

from asyncrl.errors import BadTransfer
from asyncrl.models.memory import FlatTensors, WeightMemory
from asyncrl.types import Version
from asyncrl.weights.delta import apply_deltas
from asyncrl.weights.messages import Manifest


class Assembly:
    """Collects the buckets of one manifest, in new memory, which is sealed after the last one; or has them all at once, in the
    publisher's own.

    A bucket from the wire is verified where its user will read it, after it was copied. In the publisher's memory there is
    nothing to verify: the kernel has sealed it, so these are the very pages that any checksum would be made of. What deltas
    make of the base is verified block by block, whatever the base was. Raises
    BadTransfer for a manifest that contradicts itself and for bytes that don't match their checksum; then the whole assembly
    is worthless.
    """

    def __init__(self, manifest: Manifest, shared: WeightMemory | None = None) -> None:
        """shared: the publisher's memory, if this process can see it; else it takes its own, and raises ConfigError if there
        isn't enough."""
        manifest.check()
        self.manifest, self.version, self.is_shared = manifest, manifest.version, shared is not None
        self.begun_at = time.monotonic()
        self._deltas = () if shared else manifest.steps
        nbytes = manifest.sent_bytes if self._deltas else manifest.total_bytes
        self.memory = shared or WeightMemory.create(nbytes, f"weights {self.version}")
        self._missing = set[int]() if shared else set(range(manifest.bucket_count))
        self._asked: dict[int, int] = {}  # bucket -> number of the last Hello sent before asking
        self._unasked = sorted(self._missing, reverse=True)
        self.arrived: int | None = 0 if self._missing else None  # how many of the first ones are there; None: all, sealed

    @property
    def whole(self) -> bool:
        return not self._missing

    @property
    def base(self) -> Version | None:
        """The version that its deltas change."""
        return self.manifest.base if self._deltas else None

    def tensors(self, base: WeightMemory | None = None) -> FlatTensors:
        """The tensors of a whole assembly: without a copy, or in new memory what its deltas make of `base`.

        Raises BadTransfer if it isn't whole, or those weren't made against this base; ConfigError if there isn't the memory.
        """
        if self._missing:
            raise BadTransfer(f"weights {self.version}: {len(self._missing)} buckets are missing; not shown")
        if not self._deltas:
            return FlatTensors(self.manifest.tensors, self.memory)
        if base is None or base.nbytes != self.manifest.total_bytes:
            raise BadTransfer(f"weights {self.version} as deltas against {self.base}, which is not what is here; not shown")
        memory, ends = WeightMemory.create(base.nbytes, f"weights {self.version}"), [*accumulate(self._deltas, initial=0)]
        apply_deltas(base, [self.memory.bytes[begin:end] for begin, end in pairwise(ends)], memory)
        memory.seal()
        return FlatTensors(self.manifest.tensors, memory)

    def ask(self, credit: int, hello: int, before: int | None = None) -> list[int]:
        """The buckets to ask for now, so that at most `credit` are outstanding. hello: number of the last Hello. before: those
        from this one on are not to be had yet."""
        asked = []
        while self._unasked and len(self._asked) < credit and (before is None or self._unasked[-1] < before):
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
        if dropped:
            self._unasked = sorted({*self._unasked, *dropped}, reverse=True)
        return len(dropped)

    def ask_again(self) -> None:
        """What was asked for and isn't here is to be had from somebody else."""
        self.answered(max(self._asked.values(), default=0) + 1)

    def put(self, index: int, payload: memoryview, checksum: int) -> None:
        """Takes one bucket from the wire, and what its Manifest.checksum must be. A bucket that is already there is ignored."""
        if index not in self._missing:
            return
        part = self.manifest.bucket(index)
        if len(payload) != part.stop - part.start:
            raise BadTransfer(
                f"weights {self.version}, bucket {index}: {len(payload)} bytes, expected {part.stop - part.start}; not shown"
            )
        self.memory.write(part.start, payload)
        self._asked.pop(index, None)
        if (found := self.manifest.checksum(index, self.memory.bytes[part])) != checksum:
            raise BadTransfer(f"weights {self.version}, bucket {index}: checksum {found:016x}, not {checksum:016x}; not shown")
        self._missing.discard(index)
        if self.whole:
            self.memory.seal()
            self.arrived = None
        while self.arrived is not None and self.arrived not in self._missing:
            self.arrived += 1
