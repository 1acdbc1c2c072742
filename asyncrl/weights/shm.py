"""One immutable file per version in shared memory: the fast way to receivers on the same node.

A file is written beside its final name, then renamed: whoever can open it finds all of it. It stays readable to a
receiver that has it open even after its publisher unlinked it or died. Why not multiprocessing.shared_memory: its resource
tracker unlinks a segment when *any* process that attached to it exits.

A publisher holds an advisory lock on its files for as long as it lives; the kernel drops it however the process ends. So
a file without a lock is a leftover, and `sweep` needs no process ids (which mean nothing across containers).
"""

import errno
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.types import Version

FreeBytes = Callable[[Path], int]


def default_folder() -> Path:
    """/dev/shm where there is one, else the temporary folder (then the page cache is the shared memory)."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def node_id() -> str:
    """The same on all processes of one booted machine. Whether they share a folder too, only opening a file tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def _prefix(run_id: str) -> str:
    # The hash keeps run `a` from sweeping the files of run `a.b`; the slug is for people.
    slug = re.sub(r"[^A-Za-z0-9_-]", "_", run_id)[:40]
    return f"asyncrl-{slug}-{hashlib.blake2b(run_id.encode(), digest_size=6).hexdigest()}."


def sweep(folder: Path, run_id: str) -> int:
    """Unlinks what dead publishers of this run left in `folder`; returns how many files. Living publishers' files stay."""
    swept = 0
    for path in folder.glob(f"{_prefix(run_id)}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # already gone, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            swept += 1
        except OSError:  # locked: its publisher lives
            pass
        finally:
            os.close(fd)
    return swept


class VersionFile:
    """The publisher's side of one file. `view` is valid as long as somebody refers to it, also after `close`."""

    def __init__(self, folder: Path, run_id: str, version: Version, size: int, free: FreeBytes = free_bytes) -> None:
        """Makes the hidden file. Raises ConfigError if `folder` has less than `size` bytes free."""
        available = free(folder)
        if size > available:
            raise ConfigError(_no_space(folder, version, size, available))
        # The token keeps two publishers of one version apart: neither may replace or unlink the other's file.
        self.path = folder / f"{_prefix(run_id)}{version}.{secrets.token_hex(4)}"
        self._hidden = self.path.with_name(self.path.name + ".tmp")
        self._folder, self._version, self._size = folder, version, size
        self._fd = os.open(self._hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self.view = memoryview(b"")

    def write(self, pieces: Iterator[tuple[int, memoryview]]) -> None:
        """Copies (offset, bytes) into the file, and maps it. Raises ConfigError when the space runs out meanwhile."""
        # write() and not a writable map: a full file system is then an error to report, not a SIGBUS.
        try:
            os.ftruncate(self._fd, self._size)
            for offset, data in pieces:
                while data:
                    written = os.pwrite(self._fd, data, offset)
                    data, offset = data[written:], offset + written
            if self._size:
                self.view = memoryview(mmap.mmap(self._fd, self._size, prot=mmap.PROT_READ))
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                available = free_bytes(self._folder)
                raise ConfigError(_no_space(self._folder, self._version, self._size, available)) from error
            raise

    def reveal(self) -> None:
        """Gives the file its name: from here on receivers can open it."""
        self._hidden.rename(self.path)

    def close(self) -> None:
        """Unlinks the file and gives up its lock. Harmless when repeated."""
        self._hidden.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _no_space(folder: Path, version: Version, size: int, available: int) -> str:
    return (
        f"weights {version} need {size:,} bytes in {folder}, which has {available:,} free: they can't be shared within the "
        f"node; enlarge {folder} (docker: --shm-size), or set bus.transport=tcp"
    )


def open_shared(path: str, size: int) -> int | None:
    """A file descriptor on a publisher's file; None if it isn't there for us (gone, other container, other user)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    if os.fstat(fd).st_size != size:
        os.close(fd)
        return None
    return fd


def read_into(fd: int, window: memoryview, offset: int) -> int:
    """Copies the file's bytes from `offset` on into `window`; returns how many there were (fewer at the file's end)."""
    done = 0
    while done < len(window):
        count = os.preadv(fd, [window[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
