"""Memory that is left on this machine. No torch."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process (Linux) can take without swapping: what the machine has, and what every cgroup of it leaves."""
    meminfo = (proc / "meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable:"))
    return max(0, min([machine, *_left_by_cgroups(proc / "self/cgroup", cgroups)]))


def _left_by_cgroups(memberships: Path, root: Path) -> Iterator[int]:
    """What each memory cgroup leaves, of version 2 or 1, from this process's own up to the root.

    A container sees its own group as the root, with version 1 under a path of the host: absent folders are passed over.
    """
    with suppress(OSError):
        for line in memberships.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "memory" not in controllers.split(","):
                continue
            top, (limit, usage, cache) = (root, _CGROUP_2) if number == "0" else (root / "memory", _CGROUP_1)
            own = top / path.lstrip("/")
            for group in (own, *own.parents[: len(own.parts) - len(top.parts)]):
                with suppress(OSError, ValueError):  # not there, or without a limit ("max")
                    stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                    # The kernel gives back file pages that nobody used of late, before it kills.
                    used = int((group / usage).read_text()) - int(stat.get(cache, 0))
                    yield int((group / limit).read_text()) - used
