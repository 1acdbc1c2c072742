"""The learner's end of the weight bus: stages a version, makes it visible when it is whole, and lets receivers pull it.

publish()                 caller's thread: stage ──► sealed memory   returns as soon as all bytes are there
delta thread              what changed against the version before, if the codec is `delta` and it is of use to a receiver
I/O thread                visible ──► hint to every receiver;  answers pulls all the while

A version whose delta is being made is seen only by receivers that share its memory. It travels whole where the delta can't be
made, and where the next version or `close` comes first.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from msgspec.structs import replace

from asyncrl.errors import Closed, Unavailable
from asyncrl.interfaces import Tensors
from asyncrl.models.memory import FlatTensors
from asyncrl.types import Version
from asyncrl.weights.delta import encode_delta
from asyncrl.weights.messages import MAX_BUCKET_BYTES, Manifest
from asyncrl.weights.serving import Serving
from asyncrl.weights.sockets import Address, PublisherSocket, Waker
from asyncrl.weights.versions import Live, VersionDelta

SHOW_TIMEOUT_S = 60.0  # how long publish waits until the version before is visible
STOP_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class WeightPublisher:
    """Publishes weights as learner `incarnation`. Implements interfaces.WeightSink.

    transport `auto` lets receivers of this node open the memory that the version lies in, and serves the same bytes over TCP;
    `tcp` only serves them. Holds at most two versions, and a third while slow receivers take an older one. No receiver can
    hold up `publish` or another receiver. bucket_bytes: what is sent and checked as one, at most 64 MiB.
    codec `delta`: who holds an earlier version gets what changed since, if that is less; but every anchor_freq-th version
    whole. Keeps deltas of fewer bytes than a version has.
    fanout: nodes that it serves itself; their receivers pass versions on, each to its node and to so many others (tree.py).
    0: it serves all.
    Raises zmq.ZMQError if `host` is not an address of this node.
    """

    def __init__(
        self,
        incarnation: int,
        *,
        host: str = "127.0.0.1",
        transport: Literal["auto", "tcp"] = "auto",
        bucket_bytes: int = 1 << 20,
        codec: Literal["full", "delta"] = "full",
        anchor_freq: int = 100,
        fanout: int = 0,
    ) -> None:
        if not 1 <= bucket_bytes <= MAX_BUCKET_BYTES:
            raise ValueError(
                f"bucket_bytes={bucket_bytes} is outside 1 to {MAX_BUCKET_BYTES}: receivers would refuse them; use some MiB"
            )
        self._incarnation, self._transport, self._bucket_bytes = incarnation, transport, bucket_bytes
        self._deltas = ThreadPoolExecutor(1, "weight-delta") if codec == "delta" else None
        self._anchor_freq, self._since_anchor = anchor_freq, 0
        self._changed = threading.Condition()
        self._pending = False  # a version's bytes are there, and it is not yet visible
        self._staged: tuple[Live, bool] | None = None  # it is to be shown; False: to receivers that share memory
        self._enough = threading.Event()  # no time is left for the delta that is being made
        self._newest: Version | None = None
        self._closing = False
        self._failure: BaseException | None = None
        self._gauges = dict.fromkeys(("stage_s", "staged_bytes", "delta_s", "delta_bytes"), 0.0)
        self._waker = Waker()
        self._socket = PublisherSocket(host, incarnation)
        self._serving = Serving(self._socket, self._waker, self._changed, fanout=fanout)
        self._thread = threading.Thread(target=self._run, name="weight-publisher", daemon=True)
        self._thread.start()

    def admit(self, receiver: str, incarnation: int = 0) -> Address:
        """What this receiver needs to find and open this publisher, with keys of its own. A secret. From any thread.

        Raises Fenced for one that a later incarnation has replaced.
        """
        return self._socket.admit(receiver, incarnation)

    def publish(self, version: Version, weights: Tensors | Callable[[str], FlatTensors]) -> None:
        """Stages the weights, then returns; they may change again at once. The version becomes visible right after.

        weights: tensors, which are copied; or what lays them into sealed memory, given a name for them (`Staging.staged`).
        Waits for no receiver.
        Raises ConfigError (not enough memory), ValueError (version out of order, dtype that can't be sent), Closed,
        Unavailable (the I/O thread failed), and what staging them raises; then there is no such version.
        """
        begin = time.monotonic()
        with self._changed:
            self._check_order(version)
            self._enough.set()
            if not self._changed.wait_for(lambda: not self._pending or self._failure, timeout=SHOW_TIMEOUT_S):
                raise Unavailable(f"weight publisher: weights {self._newest} are not visible after {SHOW_TIMEOUT_S:g} s")
            self._check_running()
            base = self._serving.make_room()
        staged = self._stage(version, weights)
        with self._changed:
            self._check_running()
            self._newest, self._pending = version, True
            self._gauges["stage_s"], self._gauges["staged_bytes"] = time.monotonic() - begin, float(staged.memory.nbytes)
            self._hand_over(staged, self._deltas is None or base is None)
            if self._deltas is None or base is None:
                self._gauges["delta_s"] = self._gauges["delta_bytes"] = 0.0
            else:
                self._enough.clear()
                self._deltas.submit(self._add_delta, base, staged)

    def gauges(self) -> dict[str, float]:
        """stage_s, staged_bytes: the last publish. delta_s, delta_bytes: of the last version that is visible to all, 0 if it
        travels whole. The rest: see `Serving.gauges`. Raises Unavailable (the I/O thread failed)."""
        with self._changed:
            self._check_failure()
            return self._gauges | self._serving.gauges()

    def close(self) -> None:
        """Stops serving. Receivers get nothing more, a version not yet visible included."""
        with self._changed:
            if not self._closing:
                self._closing = True
                self._enough.set()
                self._waker.set()
        if self._deltas is not None:
            self._deltas.shutdown(cancel_futures=True)
        self._thread.join(STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._waker.close()

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise Unavailable(f"weight publisher: its I/O thread failed: {self._failure!r}") from self._failure

    def _check_running(self) -> None:
        self._check_failure()
        if self._closing:
            raise Closed("weight publisher is closed: nothing can be published")

    def _check_order(self, version: Version) -> None:
        if version.incarnation != self._incarnation:
            raise ValueError(
                f"weights {version} from a publisher of incarnation {self._incarnation}: receivers would mix them up"
            )
        if self._newest is not None and version <= self._newest:
            raise ValueError(f"weights {version} after {self._newest}: receivers would never take them; versions must rise")

    def _stage(self, version: Version, weights: Tensors | Callable[[str], FlatTensors]) -> Live:
        what = f"weights {version}"
        staged = weights(what) if callable(weights) else FlatTensors.copy_of(weights, what)
        manifest = Manifest(
            version=version,
            tensors=staged.specs,
            total_bytes=staged.memory.nbytes,
            bucket_bytes=self._bucket_bytes,
            place=staged.memory.place if self._transport == "auto" else None,
        )
        return Live(manifest=manifest.signed(), memory=staged.memory)

    def _hand_over(self, staged: Live, ready: bool) -> None:
        """To the I/O thread, unless that has ended. Lock held."""
        if not self._closing:
            self._staged = staged, ready
            self._waker.set()

    def _add_delta(self, base: Live, staged: Live) -> None:
        """Has the version shown to all, with the deltas that lead to it from earlier ones if they are less than all of it."""
        begin, steps = time.monotonic(), tuple[VersionDelta, ...]()
        try:
            steps = self._steps(base, staged)
        except Exception as error:
            what = f"{error!r}"  # itself it would keep both versions in memory for as long as a log has it
            log.warning("weights %s travel whole: what changed since %s can't be told: %s", staged.version, base.version, what)
        if not steps:
            self._since_anchor = 0
        with self._changed:
            self._gauges["delta_s"] = time.monotonic() - begin if steps else 0.0
            self._gauges["delta_bytes"] = float(len(steps[-1].data)) if steps else 0.0
            self._hand_over(replace(staged, steps=steps), ready=True)

    def _steps(self, base: Live, staged: Live) -> tuple[VersionDelta, ...]:
        self._since_anchor += 1
        if self._since_anchor >= self._anchor_freq or base.manifest.tensors != staged.manifest.tensors:
            return ()
        data = encode_delta(base.memory, staged.memory, staged.manifest.tensors, self._enough)
        if data is None:
            return ()
        steps = (*base.steps, VersionDelta(base=base.version, version=staged.version, data=data))
        while steps and sum(len(step.data) for step in steps) >= staged.memory.nbytes:
            steps = steps[1:]
        return steps

    def _run(self) -> None:
        """The I/O thread: serves, and shows what was staged."""
        try:
            while not self._closing:
                self._serving.step(wait_s=1.0)
                with self._changed:
                    if self._staged is not None and not self._closing:
                        live, ready = self._staged
                        self._serving.show(live, ready)
                        self._staged, self._pending = None, not ready
                        self._changed.notify_all()
        except BaseException as error:  # kept for publish to raise: a thread has no caller
            self._failure = error
        finally:
            with self._changed:
                self._staged, self._pending = None, False
                self._serving.close()
                self._changed.notify_all()
            self._socket.close()
