"""Ray itself: joined or started for a run, and left as it was found."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from asyncrl.cluster.forkserver import forkserver
from asyncrl.config import Deployment
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.processes import ENDING
from asyncrl.scratch import session_in_use

WORKER_MODULES = (  # what takes actors long to import; nothing of it imports Ray
    "asyncrl.generate.embedded.torch_kind",
    "asyncrl.generate.generator",
    "asyncrl.learn.build",
    "asyncrl.learn.learner",
    "asyncrl.replay.store",
    "asyncrl.reward.worker",
)


@contextlib.contextmanager
def heed_signals() -> Iterator[None]:
    """Around Ray's start: signals of `ENDING` end it as KeyboardInterrupt, when it is done at the latest; their handlers stay.

    Ray puts two in its place: one exits with status 15 while Ray starts, the other prints a native stack and aborts, before
    anything is cleaned up. And what a handler raises is dropped, with a page about it, where Python happens to be in a hook of
    one of Ray's forks; so the signals that came are also read from a pipe.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    handler, former = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    tell = sys.unraisablehook
    sys.unraisablehook = lambda drop: None if drop.exc_type in (KeyboardInterrupt, SystemExit) else tell(drop)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        sys.unraisablehook = tell
        signal.set_wakeup_fd(former)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        os.close(writer)
        with open(reader, "rb") as pipe:
            came = pipe.read() or b""
    if set(ENDING) & set(came):
        raise KeyboardInterrupt


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
    with contextlib.ExitStack() as in_use:
        try:
            own: dict[str, Any] = {}
            if not address:
                own = {"num_cpus": deployment.num_cpus, "include_dashboard": False}
                if not deployment.generators.place.gpus and not deployment.learner.place.gpus:
                    own["runtime_env"] = {"py_executable": in_use.enter_context(forkserver(WORKER_MODULES))}
            session = _join_or_start(address, own)
            if not address:
                in_use.enter_context(session_in_use(session))
            yield not address
        finally:
            ray.shutdown()


def _join_or_start(address: str, own: dict[str, Any]) -> Path:
    """The folder of Ray's session. own: settings of one that is started."""
    try:
        with heed_signals(), deaf_to_hangups():
            context = ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError) as error:
        if not address:
            raise
        raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error
    return Path(context.address_info["session_dir"])


@contextlib.contextmanager
def deaf_to_hangups() -> Iterator[None]:
    """Processes that are started inside, and what these start, never get a SIGHUP: a terminal that closes sends it to all of
    them at once, and the run could not end in order. Ray does the same for Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
