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


def test_where_memory_can_not_be_shared_it_still_holds_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LINUX", False)
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(True)}
    copied = FlatTensors.copy_of(tensors, "weights")
    assert all(torch.equal(copied[name], tensors[name]) for name in tensors)
    assert WeightMemory.open(copied.memory.place, copied.memory.nbytes) is None
