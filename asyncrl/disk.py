"""Full disks: looked for before something is written, and named when it happens all the same."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from asyncrl.errors import DiskFull


def full_disk(error: BaseException | None) -> str:
    """What the system said, if this error or one that it came of says that a disk is full or a quota used up; else ""."""
    if error is None:
        return ""
    for number in (errno.ENOSPC, errno.EDQUOT):
        # safetensors has it in words only; torch says something else while it handles the system's error
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return os.strerror(number)
    return full_disk(error.__cause__ or error.__context__)


@contextlib.contextmanager
def naming_full_disk(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Around what writes to `path` or below it: an error that says that the disk is full becomes DiskFull, with figures.

    needed_bytes: what is written there, or what it takes to go on; 0 where nobody knows.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not (said := full_disk(error)):
            raise
        raise _no_room(path, needed_bytes, f" ({said})") from error


def require_space(path: Path, needed_bytes: int) -> None:
    """Raises DiskFull unless `needed_bytes` are free where `path` lies, or will lie."""
    if free_bytes(path) < needed_bytes:
        raise _no_room(path, needed_bytes)


def free_bytes(path: Path) -> int:
    """What this user may still write where `path` lies, or will lie. A quota may leave less."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def as_size(size_bytes: float) -> str:
    """As `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"


def _no_room(path: Path, needed_bytes: int, said: str = "") -> DiskFull:
    needed = f"{as_size(needed_bytes)} are needed" if needed_bytes else "more is needed"
    return DiskFull(
        f"no room for {path}{said}: {needed}, {as_size(free_bytes(path))} are free. What was saved and acknowledged before is "
        "whole: make room (`asyncrl clean` lists what dead runs left), then go on, a run with --resume"
    )
