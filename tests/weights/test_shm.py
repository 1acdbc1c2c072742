import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl.errors import ConfigError
from asyncrl.types import Version
from asyncrl.weights import shm

V = Version(2, 7)
LEAVER = """
import os, sys
from pathlib import Path
from asyncrl.types import Version
from asyncrl.weights.shm import VersionFile
files = [VersionFile(Path(sys.argv[1]), run, Version(1, 1), 3) for run in ("run", "run", "other")]
for file in files: file.write(iter([(0, memoryview(b"abc"))]))
files[0].reveal()
print("made", flush=True)
os.kill(os.getpid(), 9)
"""


def make(folder: Path, data: bytes = b"abc", run_id: str = "run") -> shm.VersionFile:
    file = shm.VersionFile(folder, run_id, V, len(data))
    file.write(iter([(0, memoryview(data))]))
    return file


def test_a_file_has_its_name_only_when_revealed(tmp_path: Path) -> None:
    file = make(tmp_path)
    assert shm.open_shared(str(file.path), 3) is None
    file.reveal()
    fd = shm.open_shared(str(file.path), 3)
    assert fd is not None
    assert "2.7" in file.path.name
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    file.close()
    assert list(tmp_path.iterdir()) == []
    window = bytearray(5)
    assert shm.read_into(fd, memoryview(window), 0) == 3  # open files outlive their name
    assert bytes(window) == b"abc\0\0"
    assert bytes(file.view) == b"abc"
    os.close(fd)


def test_wrong_size_or_absent_is_not_ours(tmp_path: Path) -> None:
    file = make(tmp_path)
    file.reveal()
    assert shm.open_shared(str(file.path), 4) is None
    assert shm.open_shared(str(tmp_path / "absent"), 3) is None
    file.close()


def test_an_empty_version_is_a_file_too(tmp_path: Path) -> None:
    file = make(tmp_path, b"")
    file.reveal()
    assert bytes(file.view) == b""
    file.close()
    file.close()


def test_low_space_names_value_bound_and_fix(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"weights 2\.7 need 3,000 bytes in .* which has 2,999 free.*--shm-size.*transport=tcp"
    ):
        shm.VersionFile(tmp_path, "run", V, 3000, free=lambda folder: 2999)
    assert list(tmp_path.iterdir()) == []
    shm.VersionFile(tmp_path, "run", V, 2999, free=lambda folder: 2999).close()


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[tuple[int, memoryview]]:
        yield 0, memoryview(b"a")
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="device"):
        shm.VersionFile(tmp_path, "run", V, 3).write(pieces())
    assert list(tmp_path.iterdir()) == []


def test_sweep_takes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    living, foreign = make(tmp_path), make(tmp_path, run_id="run.b")
    living.reveal()
    foreign.reveal()
    (tmp_path / "somebody's file").touch()
    done = subprocess.run([sys.executable, "-c", LEAVER, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "made\n", done.stderr
    before = set(tmp_path.iterdir())
    assert len(before) == 6
    assert shm.sweep(tmp_path, "run") == 2  # one whole, one half-written
    assert {living.path, foreign.path} < set(tmp_path.iterdir())
    assert len(before - set(tmp_path.iterdir())) == 2
    living.close()
    foreign.close()


def test_two_publishers_of_one_version_keep_apart(tmp_path: Path) -> None:
    first, second = make(tmp_path, b"old"), make(tmp_path, b"new")
    first.reveal()
    second.reveal()
    first.close()
    assert second.path.read_bytes() == b"new"
    second.close()


def test_run_ids_may_hold_anything(tmp_path: Path) -> None:
    file = make(tmp_path, run_id="../a b/ü" * 30)
    file.reveal()
    assert file.path.parent == tmp_path
    file.close()
