"""Ray itself: joined or started for a run, and left as it was found."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import ray

from asyncrl.config import Deployment
from asyncrl.errors import ConfigError, Unavailable


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


@contextlib.contextmanager
def ray_session(deployment: Deployment) -> Iterator[bool]:
    """Ray for the duration of a run; yields whether everything is sure to run on this machine.

    A Ray that was already there, or is joined by address, is left running. Raises Unavailable if no cluster answers.
    """
    if ray.is_initialized():
        yield False
        return
    address = deployment.ray_address or os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ConfigError(f"ray_address={address!r}: a run needs its driver in the cluster; use `ray job submit` instead")
    own = {} if address else {"num_cpus": deployment.num_cpus, "include_dashboard": False}
    try:
        with _own_sigterm():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError) as error:
        if not address:
            raise
        raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error
    try:
        yield not address
    finally:
        ray.shutdown()
