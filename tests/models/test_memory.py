"""Memory for weights: who can open it, that nobody can change it, and when it goes."""

import mmap
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from msgspec.structs import replace

from asyncrl.errors import ConfigError
from asyncrl.models import memory
from asyncrl.models.memory import FlatTensors, Place, WeightMemory

MAKER = """
import sys, time, msgspec, torch
from asyncrl.models.memory import FlatTensors
made = FlatTensors.copy_of({"a": torch.arange(3.0)}, "weights")
print(msgspec.json.encode((made.memory.place, made.memory.nbytes)).decode(), flush=True)
sys.stdin.read()
"""

OPENER = """
import os, sys
from asyncrl.models.memory import Place, WeightMemory
assert WeightMemory.open(Place("", sys.argv[1], b""), 3) is None
try:
    os.open("/dev/tty", os.O_RDWR)
except OSError:
    sys.exit(0)
sys.exit("it has a terminal now")
"""


def sealed(data: bytes = b"abc") -> WeightMemory:
    made = WeightMemory.create(len(data), "weights")
    made.write(0, memoryview(data))
    made.seal()
    return made


def test_memory_can_be_opened_only_when_it_is_sealed() -> None:
    made = WeightMemory.create(3, "weights")
    made.write(0, memoryview(b"abc"))
    assert WeightMemory.open(made.place, 3) is None
    made.seal()
    opened = WeightMemory.open(made.place, 3)
    assert opened is not None
    made.close()
    assert bytes(opened.bytes) == bytes(opened.flat.numpy()) == b"abc"  # open memory outlives its maker's hold


def test_sealed_memory_is_changed_by_nobody() -> None:
    made = sealed()
    opened = WeightMemory.open(made.place, 3)
    assert opened is not None
    for fd in (made._fd, os.open(made.place.path, os.O_RDWR)):
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 64)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 67)
    made.flat[0] = 0  # of this process's mapping alone
    assert bytes(opened.bytes) == b"abc"
    os.close(fd)


def test_others_may_write_until_it_is_sealed() -> None:
    made = WeightMemory.create(3, "weights")
    joined = WeightMemory.open(made.place, 3, sealed=False)
    assert joined is not None
    assert WeightMemory.open(replace(made.place, token=b"0" * 16), 3, sealed=False) is None
    assert WeightMemory.open(made.place, 4, sealed=False) is None
    joined.write(1, memoryview(b"bc"))
    made.write(0, memoryview(b"a"))
    made.seal()  # which a writable map anywhere would forbid
    with pytest.raises(PermissionError):
        joined.write(0, memoryview(b"x"))
    assert WeightMemory.open(made.place, 3, sealed=False) is None
    assert bytes(made.bytes) == b"abc"


def test_what_is_not_this_memory_is_not_opened(tmp_path: Path) -> None:
    made = sealed()
    path = tmp_path / "file"
    path.write_bytes(b"0" * 67)
    assert WeightMemory.open(made.place, 4) is None
    assert WeightMemory.open(replace(made.place, token=b"0" * 16), 3) is None
    assert WeightMemory.open(Place("", str(path), b"0" * 16), 3) is None
    assert WeightMemory.open(Place("", str(tmp_path / "absent"), b""), 3) is None
    stale = made.place
    made.close()
    other = sealed(b"xyz")  # of the same size, under the same descriptor
    assert other.place.path == stale.path
    assert WeightMemory.open(stale, 3) is None


def test_a_planted_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "planted")  # nobody will ever write to it
    assert WeightMemory.open(Place("", str(tmp_path / "planted"), b""), 3) is None
    os.mkfifo(tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert WeightMemory.open(Place("", str(tmp_path / "link"), b""), 3) is None


def test_a_path_that_is_none_is_not_opened() -> None:
    for path in ("", "/proc/self/fd/\0", "x" * 5000, "/proc/self/mem"):
        assert WeightMemory.open(Place("", path, b""), 3) is None


def test_a_pipe_does_not_block() -> None:
    ends = os.pipe()
    assert WeightMemory.open(Place("", f"/proc/self/fd/{ends[0]}", b""), 3) is None
    for end in ends:
        os.close(end)


def test_a_terminal_does_not_become_ours() -> None:
    ends = pty.openpty()
    child = subprocess.run([sys.executable, "-c", OPENER, os.ttyname(ends[1])], start_new_session=True, timeout=60)
    for end in ends:
        os.close(end)
    assert child.returncode == 0


def test_too_little_memory_names_value_bound_and_fix() -> None:
    with pytest.raises(ConfigError, match=r"weights 2\.7 need 1,125,899,906,842,688 bytes .* has [\d,]+ left.*more memory"):
        WeightMemory.create(1 << 50, "weights 2.7")


def test_a_copy_that_breaks_off_leaves_nothing(descriptors: Callable[[], int]) -> None:
    class Breaking(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise RuntimeError("the device is gone")

    before = descriptors()
    with pytest.raises(RuntimeError, match="device"):
        FlatTensors.copy_of(Breaking(a=torch.ones(2)), "weights")
    assert descriptors() == before


def test_memory_goes_with_its_last_reader_even_if_its_maker_is_killed(descriptors: Callable[[], int]) -> None:
    before = descriptors()
    child = subprocess.Popen([sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    place, nbytes = msgspec.json.decode(child.stdout.readline(), type=tuple[Place, int])
    opened = WeightMemory.open(place, nbytes)
    child.kill()
    child.communicate()
    assert opened is not None
    view = opened.flat.view(torch.float32)
    del opened
    assert view.tolist() == [0.0, 1.0, 2.0]
    assert WeightMemory.open(place, nbytes) is None
    del view
    assert descriptors() == before


def shared_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_a_run_that_is_killed_leaves_nothing_behind() -> None:
    before = shared_files()
    child = subprocess.Popen([sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    place, nbytes = msgspec.json.decode(child.stdout.readline(), type=tuple[Place, int])
    mine = {name for name in shared_files() - before if "asyncrl" in name or str(child.pid) in name}
    assert mine == set()  # there is no name that another user could have taken first, nor one to sweep
    child.kill()
    child.communicate()
    assert not {name for name in shared_files() - before if "asyncrl" in name or str(child.pid) in name}
    assert WeightMemory.open(place, nbytes) is None


# ------------------------------------------------------------------------------------------------ how much there is


def group(limit: int | str, used: int, cache: int, *, version: int, where: str = "") -> dict[str, str]:
    """The files of one cgroup, in MiB."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    values = [str(size << 20) if isinstance(size, int) else size for size in (limit, used)]
    stat = f"anon 5\n{names[2]} {cache << 20}\n"
    return {where + names[0]: values[0], where + names[1]: values[1], where + "memory.stat": stat}


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/", {}, 8 << 10),  # no limit anywhere: what the machine has
        ("0::/\n", group(3000, 2000, 500, version=2), 1500),  # a container
        ("0::/a/b\n", group("max", 2000, 500, version=2, where="a/b/") | group(1000, 900, 0, version=2, where="a/"), 100),
        ("0::/a\n", group(1000, 1100, 0, version=2, where="a/"), 0),
        ("0::/a\n", group(1 << 20, 5, 0, version=2, where="a/"), 8 << 10),  # more than the machine has
        ("4:cpu,memory:/a\n0::/\n", group(3000, 2000, 500, version=1, where="memory/a/"), 1500),
        ("4:memory:/docker/7f\n", group(3000, 2000, 500, version=1, where="memory/"), 1500),  # the host's path, in a container
        ("4:memory:/\n", group((1 << 43) - 1, 2000, 500, version=1, where="memory/"), 8 << 10),  # version 1's "no limit"
    ],
)
def test_what_is_available_is_what_the_machine_and_every_cgroup_leave(
    tmp_path: Path, membership: str, files: dict[str, str], left: int
) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (proc / "self/cgroup").write_text(membership)
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    assert memory.available_bytes(proc, cgroups) == left << 20


def test_this_machine_has_some_memory() -> None:
    assert 0 < memory.available_bytes() < 1 << 50
