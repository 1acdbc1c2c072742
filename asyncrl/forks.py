"""Processes that run the user's code, for rewards and episodes: forks of one that has loaded it.

    owner ── keeper ── forker, which loads the code ─┬─ keeper ── fork ── whatever the user's code starts
                                                     └─ keeper ── fork ── …

Each fork has a socket to the owner. When either end is closed, the fork is killed with all that it started: see `containment`.
Messages are frames of msgpack.

    owner ── a byte, with a socket ──► forker       asks for a fork, at the forker's standard input
    owner ◄── Loaded | Broken ──────── forker       once
    owner ◄── Loaded, …, Died ──────── fork         between them, what rewards or episodes say to each other
"""

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
from msgspec import Struct

from asyncrl.containment import Namespaces, contain, refused
from asyncrl.errors import AsyncRLError, ConfigError, Unavailable
from asyncrl.processes import REAP_S, OwnedProcess, framed

LONGEST = 64 << 20  # bytes of a frame
_LONGEST_ERROR = 10_000  # characters
_THREADED = 75  # exit status of a forker whose code leaves threads running
_OF_ALLOCATOR = "jemalloc_bg_thd"  # the one thread that a fork does without: pyarrow's, and so pandas'
_LOG_BYTES = 64 << 20  # of a log, which is begun anew then
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # or numpy starts others as it is imported

Run = Callable[[socket.socket], None]


class Loaded(Struct, frozen=True, tag="loaded"):
    """The user's code is there."""


class Broken(Struct, frozen=True, tag="broken"):
    """It can't be loaded: nobody ever could."""

    error: str


class Died(Struct, frozen=True, tag="died"):
    """The fork ended, and nothing of it is left. code: as subprocess.Popen.returncode."""

    code: int


_encode = msgspec.msgpack.Encoder().encode
_decode_loaded = msgspec.msgpack.Decoder(Loaded | Broken).decode


# ------------------------------------------------------------------------------------------ the owner's end


class Forks:
    """Starts forks of a process that loads the user's code: `python -m module told`. For one thread.

    what: the code, for errors. log: where it prints; None: standard error. memory_bytes: each process's own memory.
    """

    def __init__(
        self,
        module: str,
        told: bytes,
        what: str,
        *,
        python: str = "",
        log: Path | None = None,
        start_timeout_s: float = 120.0,
        memory_bytes: int | None = None,
    ) -> None:
        limits = [str(memory_bytes or 0), str(_LOG_BYTES if log else 0)]
        self._command = [python or sys.executable, "-m", module, told.decode(), *limits]
        self._what, self._log, self._start_timeout_s = what, log, start_timeout_s
        self._ever_loaded = False  # then the code is not to blame for a process that could not
        self._ending = contextlib.ExitStack()
        self.restarts = -1

    def open(self) -> None:
        """Starts the process that loads the code."""
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs, open(self._log, "ab") if self._log else contextlib.nullcontext(2) as output:
            environment = os.environ | _ONE_THREAD
            try:
                self._forker = OwnedProcess(self._command, stdin=theirs, stdout=output, stderr=output, env=environment)
            except OSError as error:
                self._control.close()
                raise ConfigError(
                    f"{self._what}: {self._command[0]!r} can't be started ({error.strerror}); name a Python that has asyncrl"
                ) from error
        self._ending.callback(self._forker.kill, REAP_S)
        self._ending.enter_context(self._control)
        self._loaded = False
        self.restarts += 1

    def fork(self) -> socket.socket:
        """A socket to a new fork, which says Loaded first. A forker that somebody killed is replaced."""
        if self._forker.exit_code() is not None:
            self.close()
            self.open()
        ours, theirs = socket.socketpair()
        with theirs:
            self._control.settimeout(self._start_timeout_s)  # if it has much to do already
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        return ours

    def loaded(self, wait_s: float) -> bool:
        """Whether the code is loaded; waits for that so long. Raises what `failed` returns, or ConfigError, if it can't be."""
        if self._loaded:
            return True
        self._control.settimeout(wait_s)
        try:
            said = self._control.recv(2 * _LONGEST_ERROR)
        except (TimeoutError, BlockingIOError):
            return False
        except ConnectionError:  # it has ended before it took all that it was asked; what it said is still there
            said = self._control.recv(2 * _LONGEST_ERROR)
        if not said:
            status = self._forker.wait(REAP_S)
            raise self.failed(status if status < 128 else status - 256)  # a signal's number, negative, as a byte
        told = _decode_loaded(said)
        if isinstance(told, Broken):
            self.close()
            raise ConfigError(told.error)
        self._loaded = self._ever_loaded = True
        return True

    def failed(self, code: int | None) -> AsyncRLError:
        """That the code could not be loaded, in the words of an error. code: of the process that died of it; None: it took too
        long. Ends all."""
        self.close()
        how = f"not loaded after start_timeout_s={self._start_timeout_s:g}" if code is None else died(code)
        where = f"see {self._log}" if self._log else "see standard error"
        blameless = self._ever_loaded or code == -signal.SIGKILL
        kind = Unavailable if blameless else ConfigError
        return kind(f"{self._what}: {how} while its file was being loaded; {where}")

    def close(self) -> None:
        """Kills all of them. Idempotent."""
        self._ending.close()


def died(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"process died: exit code {code}"
    named = {number.value: number.name for number in signal.Signals}
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"process died: {named.get(-code, f'signal {-code}')}{hint}"


# ---------------------------------------------------------------------------------------- the processes' end


def fork_for(load: Callable[[], Run], memory_bytes: int, log_bytes: int, lifeline: int) -> NoReturn:
    """What a process that `Forks` starts does first of all. load: makes what runs in each fork, with its socket.

    The code is loaded once, before the forks; unless it leaves threads running, which a fork would lack: then by each of them.
    """
    namespaces = None if refused() else Namespaces()
    code = contain(lifeline, log_bytes)
    once = code is None
    if code == _THREADED:
        code = contain(lifeline, log_bytes)
    if code is not None:
        os._exit(code & 0xFF)
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if once:
        try:
            run = load()
        except ConfigError as error:
            control.send(_encode(_broken(error)))
            os._exit(1)
        threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
        if len(threads) > 1 + threads.count(_OF_ALLOCATOR):
            os._exit(_THREADED)
    control.send(_encode(Loaded()))
    gc.freeze()  # or collecting would copy what forks share
    reaping = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # by the kernel
    while True:
        _, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not sockets:
            os._exit(0)
        with socket.socket(fileno=sockets[0]) as peer, contextlib.suppress(OSError):  # no room for another process
            if not (namespaces.fork() if namespaces else os.fork()):
                signal.signal(signal.SIGCHLD, reaping)
                control.close()
                _contained((lambda: run) if once else load, memory_bytes, peer)


def _contained(load: Callable[[], Run], memory_bytes: int, peer: socket.socket) -> NoReturn:
    """In a fork: becomes the keeper of another, in which the user's code runs."""
    try:
        if (code := contain(peer.fileno())) is not None:
            peer.send(framed(_encode(Died(code))), socket.MSG_DONTWAIT)
            os._exit(0)
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        with contextlib.suppress(OSError):  # where memory is short, this goes before anything of the run
            Path("/proc/self/oom_score_adj").write_text("1000")
        try:
            run = load()
        except ConfigError as error:
            peer.sendall(framed(_encode(_broken(error))))
            os._exit(1)
        peer.sendall(framed(_encode(Loaded())))
        run(peer)
        sys.stdout.flush()
        os._exit(0)
    except (ConnectionError, BlockingIOError):
        pass  # the owner has gone, or does not read
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _broken(error: ConfigError) -> Broken:
    return Broken(str(error)[:_LONGEST_ERROR])
