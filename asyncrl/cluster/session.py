"""Ray itself: joined or started for a run, and left as it was found."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from asyncrl.cluster.forkserver import forkserver
from asyncrl.config import Deployment
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.processes import ENDING
from asyncrl.scratch import session_in_use

_REACH_S = 5.0  # for a connection, and for an answer
_SETTINGS = b"\4"  # the kind of the frame with which each side of gRPC begins
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)
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
    with contextlib.ExitStack() as in_use:
        try:
            own: dict[str, Any] = {}
            if not address:
                own = {"num_cpus": deployment.num_cpus, "include_dashboard": False}
                if not deployment.generators.place.gpus and not deployment.learner.place.gpus:
                    own["runtime_env"] = {"py_executable": in_use.enter_context(forkserver(WORKER_MODULES))}
            session = join_or_start(address, own)
            if not address:
                in_use.enter_context(session_in_use(session))
            yield not address
        finally:
            ray.shutdown()


def join_or_start(address: str, own: Mapping[str, Any]) -> Path:
    """The folder of Ray's session. own: settings of one that is started."""
    if address:
        reach(address)
    try:
        with heed_signals(), deaf_to_hangups():
            context = ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray's own are often just that
        if address:
            raise Unavailable(f"the Ray cluster at {address!r} can't be joined: {error}") from error
        if type(error) is Exception:
            raise Unavailable(f"Ray did not start: {error} Try again when this machine has less to do") from error
        raise
    return Path(context.address_info["session_dir"])


def reach(address: str) -> None:
    """Returns if a Ray cluster lets this process in; Ray itself would try for many minutes. Raises ConfigError for what is no
    address of one, Unavailable if nothing answers there, or something else does, or the token is wrong. Waits some seconds."""
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    wanted = "expected HOST:PORT of the head's `ray start --head --port` (6379 unless it says otherwise), or auto"
    if "://" in address:
        raise ConfigError(f"Ray at {address!r}: {wanted}; from outside of the cluster use `ray job submit --address http://…`")
    plain = os.environ.get("RAY_USE_TLS", "0") == "0"
    found, fix = address, f"{wanted}: `ray status` on the head says whether it is up"
    try:
        found = canonicalize_bootstrap_address(address) or address
        host, _, port = found.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), _REACH_S) as peer:
            peer.sendall(_HELLO)
            other = plain and peer.recv(4, socket.MSG_WAITALL)[3:] != _SETTINGS
        why = "something else listens there" if other else ""
        if not other:
            GcsClient(address=found)
    except ValueError as error:
        raise ConfigError(f"Ray at {address!r}: {wanted}") from error
    except TimeoutError:
        why = f"nothing answers within {_REACH_S:g} s"
    except OSError as error:
        why = error.strerror or str(error).strip()
    except RayError as error:
        why = str(error).strip()
        if "token" in why.lower():
            fix = "export RAY_AUTH_MODE=token, and have the head's ~/.ray/auth_token here, or its content in RAY_AUTH_TOKEN"
    if why:
        at = f"{address!r}" if found == address else f"{address!r}, which is {found}"
        raise Unavailable(f"no Ray cluster can be joined at {at}: {why}; {fix}")


@contextlib.contextmanager
def deaf_to_hangups() -> Iterator[None]:
    """Processes that are started inside, and what these start, never get a SIGHUP: a terminal that closes sends it to all of
    them at once, and the run could not end in order. Ray does the same for Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
