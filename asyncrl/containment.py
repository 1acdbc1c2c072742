"""What a process starts ends with it, whatever it does: double forks, sessions of its own, ignored signals. Linux alone.

`contain` forks. The fork goes on; what it was forked from becomes its *keeper*, the parent of all orphans below it. Once the
fork ends, or the owner goes, the keeper kills its children, then theirs, which are its own by then, until none is left.

Where the machine allows it, each keeper is the first process of a PID namespace (`Namespaces`): what is below it neither sees
nor can signal what is beside it, and the kernel kills all of them with it. For processes with a single thread; standard
library only.
"""

import contextlib
import ctypes
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

from asyncrl.processes import ENDING

SWITCH = "ASYNCRL_NAMESPACES"  # environment variable; off: none are used
TICK_S = 1.0  # how often a keeper looks at its log, and reaps orphans

_PDEATHSIG, _CHILD_SUBREAPER = 1, 36  # prctl(2)
_NEWNS, _NEWUSER, _NEWPID, NEWNET = 1 << 17, 1 << 28, 1 << 29, 1 << 30  # unshare(2)
_NO_PROGRAMS, _FOLLOWING = 0b1110, 1 << 19 | 1 << 14  # mount(2): NOSUID, NODEV, NOEXEC; SLAVE, REC


def contain(owner: int, log_bytes: int = 0) -> int | None:
    """Returns twice. In the fork: None. In its keeper, once nothing is left below it: the fork's exit code, or minus the number
    of the signal that ended it.

    owner: a descriptor whose other end is closed to end all of them. log_bytes: if not 0, standard error is a log, which is
    begun anew when it is larger.
    """
    _call("prctl", _CHILD_SUBREAPER, 1)
    if not (main := os.fork()):
        os.setsid()
        _end_with_parent()
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    events = select.poll()
    events.register(owner, select.POLLRDHUP)
    events.register(ended := os.pidfd_open(main), select.POLLIN)
    code: int | None = None
    while code is None and owner not in dict(events.poll(TICK_S * 1e3)):
        code = dict(_reaped()).get(main)
        _bound_log(log_bytes)
    os.close(ended)
    codes = dict(_reaped(kill=True))
    return codes.get(main, -signal.SIGKILL) if code is None else code


def _reaped(kill: bool = False) -> Iterator[tuple[int, int]]:
    """Children that have ended, by number, and how. kill: all of them, and those that they leave behind."""
    with contextlib.suppress(ChildProcessError):  # there is none
        while True:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if kill:
                _kill_children()
            pid, status = os.waitpid(-1, 0 if kill else os.WNOHANG)
            if not pid:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _kill_children() -> None:
    """Only its own children: they keep their numbers until they are reaped, so nobody else is hit."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's by now
            if int(file.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(file.parent.name), signal.SIGKILL)


def _bound_log(log_bytes: int) -> None:
    if log_bytes and os.fstat(2).st_size > log_bytes:
        os.ftruncate(2, 0)  # those who write to it append
        os.write(2, b"asyncrl: more than %d bytes were printed before, and are gone\n" % log_bytes)


class Namespaces:
    """A PID namespace for each fork, within one that the caller moves into as its first process. Raises OSError where the
    machine refuses them. Processes have numbers in it of their own: their keeper's on the machine, and those that follow.

    more: other kinds of namespaces, of unshare(2).
    """

    def __init__(self, more: int = 0) -> None:
        self._machine = os.open("/proc", os.O_RDONLY)  # where the machine's numbers are
        _unshare(_NEWPID | more)
        if first := os.fork():  # what is outside stays for the owner, whose child it is
            _, status = os.waitpid(first, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        _end_with_parent()
        self._settle()
        self._home = os.open("/proc/self/ns/pid", os.O_RDONLY)

    def fork(self) -> int:
        """As os.fork."""
        _call("setns", self._home, _NEWPID)  # from the namespace of the last fork
        _call("unshare", _NEWPID)
        if not (pid := os.fork()):
            try:
                self._settle()
                for descriptor in (self._machine, self._home):  # what the user's code is to know nothing of
                    os.close(descriptor)
            except OSError as error:
                os.write(2, f"asyncrl: {error}\n".encode())
                os._exit(1)
        return pid

    def _settle(self) -> None:
        """Gives the first process of a namespace its own /proc, and those that follow other numbers than those of its siblings'
        have: they name files by them."""
        number = os.readlink("self", dir_fd=self._machine)
        _call("unshare", _NEWNS)
        _call("mount", None, b"/", None, _FOLLOWING, None)
        _call("mount", b"proc", b"/proc", b"proc", _NO_PROGRAMS, None)
        Path("/proc/sys/kernel/ns_last_pid").write_text(number)


def refused(more: int = 0) -> str:
    """Why this machine gives no `Namespaces`; empty if it does. It is tried, in a fork."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off"
    read, write = os.pipe()
    if not (probe := os.fork()):
        try:
            Namespaces(more)
        except OSError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as told:
        why = told.read()
    os.waitpid(probe, 0)
    return why


def _unshare(kinds: int) -> None:
    """Of its own right, or as anybody may: in a user namespace, where only its own user and group are known."""
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", kinds)
    except PermissionError:
        _call("unshare", _NEWUSER | kinds)
        for name, told in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(told)


def _end_with_parent() -> None:
    _call("prctl", _PDEATHSIG, signal.SIGKILL)


def _call(name: str, *arguments: object) -> None:
    """A system call. Raises OSError."""
    if getattr(_libc, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


_libc = ctypes.CDLL(None, use_errno=True)
