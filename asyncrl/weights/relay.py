"""Passes on what a receiver gets, while it still comes in: to its own node through memory, to other nodes over the socket."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from asyncrl.models.memory import WeightMemory
from asyncrl.types import Version
from asyncrl.weights.assembly import Assembly
from asyncrl.weights.messages import Manifest, RelayAddress
from asyncrl.weights.serving import Serving
from asyncrl.weights.sockets import PublisherSocket, Waker
from asyncrl.weights.versions import Form, Live

STOP_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class WeightRelay:
    """A receiver's side towards those that take versions from it. All methods may be called from any thread.

    host: the address by which other nodes reach this one. Keeps the newest version in this process's memory, and up to two more
    while somebody takes an older one. Raises zmq.ZMQError if `host` is not an address of this node.
    """

    def __init__(self, host: str, *, shares_memory: bool = True) -> None:
        self._shares_memory = shares_memory
        self._lock = threading.Condition()
        self._waker, self._socket = Waker(), PublisherSocket(host, 0)
        self._serving = Serving(self._socket, self._waker, self._lock)
        self._due: deque[Callable[[], None]] = deque()  # for the I/O thread, which alone may send
        self._more = self._closing = False
        self._thread = threading.Thread(target=self._run, name="weight-relay", daemon=True)
        self._thread.start()

    @property
    def source(self) -> RelayAddress:
        """Where versions can be had, for those that are welcome."""
        return self._socket.source

    def welcome(self, guests: dict[bytes, str]) -> None:
        """Serves these public keys, and no others."""
        self._socket.welcome(guests)

    def begin(self, assembly: Assembly) -> None:
        """A version has begun to arrive whole. `arrived` tells of more of it."""
        manifest = self._own(assembly.manifest, assembly.memory)
        self._do(partial(self._show, Live(manifest=manifest, memory=assembly.memory, arrived=lambda: assembly.arrived)))

    def arrived(self) -> None:
        """Guests hear how much is there."""
        self._more = True
        self._waker.set()

    def give_up(self, version: Version) -> None:
        """The rest of it will not come."""
        self._do(partial(self._serving.drop, version))

    def show(self, assembly: Assembly, memory: WeightMemory) -> None:
        """A version is there, in this memory, that arrived as what changed since another one."""
        whole = self._own(replace(assembly.manifest, base=None, steps=()), memory)
        changes = Form(manifest=assembly.manifest, pieces=(assembly.memory.bytes,))
        self._do(partial(self._show, Live(manifest=whole, memory=memory, forms={assembly.base: changes})))

    def gauges(self) -> dict[str, float]:
        """See `Serving.gauges`."""
        with self._lock:
            return self._serving.gauges()

    def close(self) -> None:
        """Stops serving: guests turn to the publisher."""
        self._closing = True
        self._waker.set()
        self._thread.join(STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._waker.close()

    def _own(self, manifest: Manifest, memory: WeightMemory) -> Manifest:
        return replace(manifest, place=memory.place if self._shares_memory else None).signed()

    def _show(self, live: Live) -> None:
        self._serving.make_room()
        self._serving.show(live)

    def _do(self, what: Callable[[], None]) -> None:
        self._due.append(what)
        self._waker.set()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._serving.step(wait_s=1.0)
                with self._lock:
                    while self._due:
                        self._due.popleft()()
                    if self._more:
                        self._more = False
                        self._serving.hint_all()
        except Exception:
            log.exception("this receiver passes no weights on any more; those that took them here turn to the publisher")
        finally:
            self._closing = True
            with self._lock:
                self._serving.close()
            self._socket.close()
