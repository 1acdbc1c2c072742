"""Ray itself: joined or started for a run, and left as it was found."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import TracebackType

import ray

from asyncrl.config import Deployment
from asyncrl.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this program's handler. Ray puts two in its place: one exits with status 15 while Ray starts, the other prints
    a native stack and aborts, before anything is cleaned up."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, handler)


class RaySession:
    """A connection to Ray for the duration of a run. A Ray that was already there, or joined by address, is left running."""

    def __init__(self, deployment: Deployment) -> None:
        self._owned = not ray.is_initialized()
        self.loopback = False  # whether everything is sure to run on this machine
        if not self._owned:
            return
        address = deployment.ray_address or os.environ.get("RAY_ADDRESS", "")
        self.loopback = not address
        if address.startswith("ray://"):
            raise ConfigError(f"ray_address={address!r}: a run needs its driver in the cluster; use `ray job submit` instead")
        with _own_sigterm():
            if address:
                try:
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                except (OSError, RuntimeError) as error:
                    raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error
            else:
                ray.init(
                    address="local",
                    num_cpus=deployment.num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._owned:
            ray.shutdown()
