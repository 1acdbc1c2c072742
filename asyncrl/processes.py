"""Child processes that never outlive their owner, nor does anything that they start. Standard library only.

Each child leads a session, and so a process group, of its own. It is given a *lifeline*: the read end of a pipe into which
nothing is ever written, and whose other end the owner alone holds. So the pipe closes when the owner ends, however it ends, and
then the whole group is killed: by the child itself where it is asyncrl's own Python (`end_with_owner`), by a guard for any
other command (`under_guard`; the guard is this file, run as a script).
"""

import contextlib
import fcntl
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class SupportsRead(Protocol):
    def read(self, size: int, /) -> bytes: ...


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what ends a job in order: Ctrl-C, whoever stops it, a closed terminal
REAP_S = 5.0  # in which the kernel has ended a killed process, unless it waits for a device


HEADER = 8  # bytes of a frame's length


def framed(body: bytes) -> bytes:
    """A message as it goes through a pipe: its length, then itself."""
    return len(body).to_bytes(HEADER) + body


def read_frame(stream: SupportsRead) -> bytes:
    """Waits for the next message; empty at the end."""
    header = stream.read(HEADER)
    return stream.read(int.from_bytes(header)) if len(header) == HEADER else b""


class OwnedProcess(subprocess.Popen[bytes]):
    """A child that leads its own process group: the group ends when this process ends, or at `kill`.

    The number of its lifeline's descriptor becomes the last argument of `command`. options: as subprocess.Popen takes them.
    Raises OSError if it can't be started.
    """

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self._killing = threading.Lock()
        lifeline, self._lifeline = os.pipe()
        try:
            super().__init__([*command, str(lifeline)], pass_fds=(lifeline,), start_new_session=True, **options)
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)

    def exit_code(self) -> int | None:
        """None while the child runs; minus the signal's number if one killed it.

        Does not reap the child, as `poll` would: so its group's number can't pass to others before `kill`.
        """
        if self.returncode is not None:
            return self.returncode
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def kill(self, after_s: float = 0.0) -> None:
        """SIGKILL to the child and its group; then reaps the child and frees the descriptors. Idempotent, thread-safe.

        Waits for the child's end for REAP_S at the most. One that waits for a device may need longer: it is left to the kernel.
        after_s: how long the child may take to end by itself what it started, once its lifeline has closed.
        """
        with self._killing:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1
            with contextlib.suppress(subprocess.TimeoutExpired):
                if after_s:
                    self.wait(after_s)
            if self.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.wait(REAP_S)
            for stream in (self.stdin, self.stdout):
                if stream is not None:
                    stream.close()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Signals of `ENDING` that come inside are handled, each of them, once it is over: what an interrupt would cut in two is
    told whole, and no lock is left half taken. For the main thread; nothing else gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as later:

        def note(number: int, frame: FrameType | None) -> None:
            later.callback(signal.raise_signal, number)

        handlers = {number: signal.signal(number, note) for number in ENDING}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def aside(work: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Runs `work` in a fork of this process, which has all that this one knows, while this one goes on without what it imports.

    Yields what waits for its result, and raises what it raised; Unavailable if the fork died. The end kills it. For a process
    with a single thread: a fork of others could inherit a lock that nobody ends.
    """
    forking = multiprocessing.get_context("fork")
    answer, told = forking.Pipe(duplex=False)
    child = forking.Process(target=_tell, args=(work, told))
    child.start()
    told.close()

    def result() -> T:
        try:
            value, error = answer.recv()
        except EOFError:
            from asyncrl.errors import Unavailable  # here: the guard below has nothing of asyncrl

            child.join()
            how = f"exit code {child.exitcode}; what it printed says why{homeless()}"
            raise Unavailable(f"process {child.pid}, which prepared the run, died: {how}") from None
        if error is not None:
            raise error
        return value

    try:
        yield result
    finally:
        child.kill()
        child.join()


def homeless() -> str:
    """That this process works in a directory which was deleted, and what to do; empty: it was not. MKL, and so torch, ends its
    process there, with `Cannot load libtorch_cpu.so`."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return ": the directory in which this command was started has been deleted; start it in one that stays"
    return ""


def _tell(work: Callable[[], object], told: Any) -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    try:
        told.send((work(), None))
    except Exception as error:
        told.send((None, error))


def end_with_owner(lifeline: int) -> None:
    """Called by a Python child first of all: from now on its process group is killed when its owner ends.

    A thread waits for that. Where a C function holds the GIL for ever (a catastrophic regular expression), the thread can't
    run: so Linux is also asked to signal the group by itself.
    """

    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    os.set_inheritable(lifeline, False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def under_guard(command: Sequence[str]) -> list[str]:
    """The command under a guard, for `OwnedProcess`. When the command ends, what it started is killed as well."""
    return [sys.executable, "-I", "-S", __file__, *command]


def _guard(command: list[str], lifeline: int) -> None:
    """Runs the command until it or the owner ends, then kills the group.

    It is two processes, of which the inner one does all this when the outer one is killed too: a Ray worker that exits kills
    its direct children, and only these.
    """
    os.set_inheritable(lifeline, False)
    outer = os.pidfd_open(os.getpid())
    if os.fork():
        signal.pause()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        ended = os.pidfd_open(process.pid)
        select.select([lifeline, ended, outer], [], [])
        if (code := process.poll()) is not None:
            print(f"guard: {command[0]} ended with exit code {code}", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"guard: {error}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":  # it must start in milliseconds: nothing of asyncrl is imported
    _guard(sys.argv[1:-1], int(sys.argv[-1]))
