"""The learner's end of the weight bus: stages a version, makes it visible when it is whole, and lets receivers pull it.

publish()                 caller's thread: copy ──► queue          returns as soon as the copy is made
I/O thread                checksums ──► rename, visible ──► hint to every receiver;  answers pulls all the while
"""

import threading
import time
from collections import deque
from pathlib import Path
from typing import Literal

import torch
from msgspec.structs import replace

from asyncrl.errors import Closed, Unavailable
from asyncrl.interfaces import Tensors
from asyncrl.types import Version
from asyncrl.weights import layout as codec
from asyncrl.weights import shm
from asyncrl.weights.messages import Manifest
from asyncrl.weights.serving import Live, Serving
from asyncrl.weights.sockets import Address, Server, Waker

SEAL_TIMEOUT_S = 600.0  # how long publish waits for the checksums of the version before
STOP_TIMEOUT_S = 10.0


class WeightPublisher:
    """Publishes weights for `run_id` as learner `incarnation`. Implements interfaces.WeightSink.

    transport `auto` stages in shared memory, for receivers on this node, and serves the same bytes over TCP; `tcp` stages
    in private memory. Holds at most two versions. No receiver can hold up `publish` or another receiver.
    Raises zmq.ZMQError if `host` is not an address of this node.
    """

    def __init__(
        self,
        run_id: str,
        incarnation: int,
        *,
        host: str = "127.0.0.1",
        transport: Literal["auto", "tcp"] = "auto",
        bucket_bytes: int = 4 << 20,
        folder: Path | None = None,
        free_bytes: shm.FreeBytes = shm.free_bytes,
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={bucket_bytes} < 1: nothing would ever be sent; use some MiB")
        self._run_id, self._incarnation = run_id, incarnation
        self._shared = transport == "auto"
        self._bucket_bytes = bucket_bytes
        self._folder = folder or shm.default_folder()
        self._free_bytes = free_bytes
        self._swept = shm.sweep(self._folder, run_id)
        self._changed = threading.Condition()
        self._to_seal: deque[Live] = deque()
        self._newest: Version | None = None
        self._closing = False
        self._failure: BaseException | None = None
        self._sums: list[int] = []  # of the version that is being sealed
        self._stage_s = self._seal_s = self._sealing_s = 0.0
        self._staged_bytes = 0
        self._waker = Waker()
        self._server = Server(host, incarnation)
        self._serving = Serving(self._server.socket, self._waker, self._changed)
        self._thread = threading.Thread(target=self._run, name="weight-publisher", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        """What subscribers need to find and open this publisher. A secret."""
        return self._server.address

    def publish(self, version: Version, tensors: Tensors) -> None:
        """Copies the tensors, then returns; they may change again at once. The version becomes visible soon after.

        Waits for the checksums of the version before, if these are still being made; for no receiver.
        Raises ConfigError (not enough shared memory), ValueError (version out of order, dtype that can't be sent), Closed,
        Unavailable (the I/O thread failed).
        """
        begin = time.monotonic()
        with self._changed:
            self._check_order(version)
            if not self._changed.wait_for(lambda: not self._to_seal or self._stopped, timeout=SEAL_TIMEOUT_S):
                raise Unavailable(f"weight publisher: weights {self._newest} still unsealed after {SEAL_TIMEOUT_S:g} s")
            self._check_running()
            self._serving.make_room()
        live = self._stage(version, tensors)
        with self._changed:
            if self._stopped:
                self._discard(live)
            self._check_running()
            self._newest = version
            self._to_seal.append(live)
            self._stage_s, self._staged_bytes = time.monotonic() - begin, len(live.data)
            self._waker.set()

    def gauges(self) -> dict[str, float]:
        """stage_s, staged_bytes: the last publish. seal_s: its checksums. The rest: see `Serving.gauges`."""
        with self._changed:
            return {
                "stage_s": self._stage_s,
                "staged_bytes": float(self._staged_bytes),
                "seal_s": self._seal_s,
                "swept_files": float(self._swept),
                **self._serving.gauges(),
            }

    def close(self) -> None:
        """Stops serving and unlinks every file. Receivers get nothing more, a version not yet visible included."""
        with self._changed:
            if not self._closing:
                self._closing = True
                self._changed.notify_all()
                self._waker.set()
        self._thread.join(STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._waker.close()

    @property
    def _stopped(self) -> bool:
        return self._closing or self._failure is not None

    def _check_running(self) -> None:
        if self._failure is not None:
            raise Unavailable(f"weight publisher: its I/O thread failed: {self._failure!r}") from self._failure
        if self._closing:
            raise Closed("weight publisher is closed: nothing can be published")

    def _check_order(self, version: Version) -> None:
        if version.incarnation != self._incarnation:
            raise ValueError(
                f"weights {version} from a publisher of incarnation {self._incarnation}: receivers would mix them up"
            )
        if self._newest is not None and version <= self._newest:
            raise ValueError(f"weights {version} after {self._newest}: receivers would never take them; versions must rise")

    def _stage(self, version: Version, tensors: Tensors) -> Live:
        specs, total = codec.plan(tensors)
        data, file = memoryview(b""), None
        if self._shared:
            file = shm.VersionFile(self._folder, self._run_id, version, total, self._free_bytes)
            file.write((offset, codec.as_bytes(piece)) for offset, piece in codec.pieces(specs, tensors))
            data = file.view
        elif total:
            copy = torch.empty(total, dtype=torch.uint8)
            for offset, piece in codec.pieces(specs, tensors):
                copy[offset : offset + len(piece)] = piece
            data = codec.as_bytes(copy)
        manifest = Manifest(
            version=version,
            tensors=specs,
            total_bytes=total,
            bucket_bytes=self._bucket_bytes,
            checksums=(),
            node=shm.node_id() if file else "",
            file=str(file.path) if file else None,
        )
        return Live(manifest=manifest, data=data, file=file)

    def _run(self) -> None:
        """The I/O thread: serves, and between two polls checksums one bucket of the version that waits."""
        try:
            while not self._closing:
                live = self._to_seal[0] if self._to_seal else None
                self._serving.step(wait_s=1.0 if live is None else 0.0)
                if live is not None:
                    self._seal_more(live)
        except BaseException as error:  # kept for publish to raise: a thread has no caller
            self._failure = error
        finally:
            with self._changed:
                while self._to_seal:
                    self._discard(self._to_seal.popleft())
                self._serving.close()
                self._changed.notify_all()
            self._server.close()

    def _seal_more(self, live: Live) -> None:
        """Checksums the next bucket; after the last one the version becomes visible."""
        manifest, begin = live.manifest, time.monotonic()
        if len(self._sums) < codec.bucket_count(manifest.total_bytes, manifest.bucket_bytes):
            part = codec.bucket_slice(len(self._sums), manifest.total_bytes, manifest.bucket_bytes)
            self._sums.append(codec.checksum(live.data[part]))
            self._sealing_s += time.monotonic() - begin
            return
        if live.file is not None:
            live.file.reveal()
        whole = replace(live, manifest=replace(manifest, checksums=tuple(self._sums)))
        with self._changed:
            self._to_seal.popleft()
            self._seal_s, self._sealing_s, self._sums = self._sealing_s, 0.0, []
            self._serving.show(whole)
            self._changed.notify_all()

    def _discard(self, live: Live) -> None:
        if live.file is not None:
            live.file.close()
