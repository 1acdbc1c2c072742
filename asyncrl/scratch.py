"""What asyncrl keeps on a machine outside of run directories: private temporary folders, sessions of a local Ray, and what its
SGLang servers have in shared memory. (Weights are in memory without a name: nothing of them is ever left.)

Whoever makes a folder locks it as long as it is used. The lock ends with that process, however it dies: so what nobody holds is
left over. Of SGLang's segments the kernel says whether any process has them open.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

SHM = Path("/dev/shm")
_MARK = "asyncrl"  # a file in what asyncrl made, or had Ray make: a name alone proves nothing


class ScratchFolder:
    """A new temporary folder that only this user can enter, in use until `close`, or until this process ends."""

    def __init__(self) -> None:
        hidden = Path(tempfile.mkdtemp(prefix=".asyncrl-"))  # until it is locked
        lock = _lock(hidden)
        (hidden / _MARK).touch()
        self.path = hidden.rename(hidden.with_name(hidden.name[1:]))
        self.close = weakref.finalize(self, _discard, self.path, lock)  # idempotent


@contextlib.contextmanager
def session_in_use(session: Path) -> Iterator[None]:
    """Around the use of a Ray that asyncrl started, whose session is in this folder."""
    lock = _lock(session)
    try:
        (session / _MARK).touch()
        yield
    finally:
        os.close(lock)


class Trace(Struct, frozen=True, kw_only=True):
    """Something that asyncrl made on this machine, in use or left over."""

    path: Path
    what: str
    size_bytes: int
    in_use: bool


def traces(temporary: Path | None = None, shm: Path = SHM) -> list[Trace]:
    """All of this user's, without waiting. What else has such a name, a link or a pipe, is passed over.

    temporary: where temporary folders and Ray's sessions are made; None: where this process makes them.
    """
    folder = temporary or Path(tempfile.gettempdir())
    ray = temporary or Path(os.environ.get("RAY_TMPDIR", folder))
    found = [(mark.parent, "temporary folder", stat.S_ISDIR) for mark in folder.glob(f"asyncrl-*/{_MARK}")]
    found += [(mark.parent, "session of Ray", stat.S_ISDIR) for mark in ray.glob(f"ray/session_*/{_MARK}")]
    found += [(path, "SGLang's shared memory", stat.S_ISREG) for path in shm.glob("sglang_loads_*")]
    seen = []
    for path, what, is_kind in sorted(found):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            if path.lstat().st_uid == os.getuid() and is_kind(path.lstat().st_mode):
                seen.append(Trace(path=path, what=what, size_bytes=_size_bytes(path), in_use=_used(path)))
    return seen


def remove(trace: Trace) -> bool:
    """Deletes what is left over, while nobody can begin to use it; False where somebody does by now."""
    try:
        lock = _lock(trace.path)
    except OSError:
        return False
    _discard(trace.path, lock)
    return not trace.path.exists()


def _used(path: Path) -> bool:
    """Whether somebody uses it, or may do so."""
    try:
        os.close(_lock(path))
    except OSError:
        return True
    return False


def _lock(path: Path) -> int:
    """A descriptor that locks a folder, or a file that nobody else has open. Raises OSError where that can't be now."""
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISDIR(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # A lease is for the only one who has the file open or mapped, on the whole machine. Whoever opens it later signals
            # him: not with SIGIO, which kills.
            fcntl.fcntl(lock, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(lock, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _size_bytes(path: Path) -> int:
    size = 0
    for entry in [path, *path.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # of a living one, gone meanwhile
            size += entry.lstat().st_size
    return size


def _discard(path: Path, lock: int) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.close(lock)
