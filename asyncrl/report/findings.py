"""What a check of this machine has found: one row of `asyncrl doctor`."""

from collections.abc import Callable
from importlib import metadata
from typing import Literal

from msgspec import Struct


class Finding(Struct, frozen=True, kw_only=True):
    """One row. A required one that is not `ok` makes the exit status of the doctor 1."""

    detail: str
    status: Literal["ok", "missing", "broken"] = "ok"
    name: str = ""  # of the row; a check leaves it out, as it stands beside the check
    fix: str = ""  # the command that fixes it
    required: bool = True


def installed_version(package: str) -> str:
    """The version of a package in this environment, by its metadata; empty if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# A row's name, what makes it, and the package to install again if that raises.
MachineCheck = tuple[str, Callable[[], Finding], str]
