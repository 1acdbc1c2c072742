"""Full disks, as the system and the libraries that write tell of them. /dev/full is one."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError

from asyncrl.disk import as_size, free_bytes, full_disk, naming_full_disk, require_space
from asyncrl.errors import DataError, DiskFull

FULL = Path("/dev/full")  # only for what opens it: who replaces a file would replace the device


def by_torch() -> None:
    with FULL.open("wb") as file:
        torch.save(torch.zeros(1 << 16), file)


def by_arrow() -> None:
    with pa.OSFile(str(FULL), "wb") as sink:
        sink.write(b"x" * (1 << 16))


def by_safetensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # seen on a full disk


def by_python() -> None:
    with FULL.open("wb", buffering=0) as file:
        file.write(b"x")


@pytest.mark.parametrize("write", [by_torch, by_arrow, by_safetensors, by_python])
def test_whoever_writes_a_full_disk_is_named(write: Callable[[], None], tmp_path: Path) -> None:
    with (
        pytest.raises(
            DiskFull, match=rf"no room for {tmp_path} \(No space left on device\): 3\.0 MiB are needed, \d.* are free"
        ),
        naming_full_disk(tmp_path, 3 << 20),
    ):
        write()


def test_a_quota_is_a_disk_and_other_errors_are_none() -> None:
    assert full_disk(OSError(errno.EDQUOT, "Disk quota exceeded")) == os.strerror(errno.EDQUOT)
    assert not full_disk(PermissionError(errno.EACCES, "denied"))
    for error in (DataError("damaged"), DiskFull("named already")):
        with pytest.raises(type(error)) as caught, naming_full_disk(Path("/")):
            raise error
        assert caught.value is error


def test_room_is_asked_for_where_a_folder_will_lie(tmp_path: Path) -> None:
    later = tmp_path / "not" / "yet"
    require_space(later, 1)
    with pytest.raises(DiskFull, match=rf"no room for {later}: 1048576\.0 GiB are needed, .* are free.*--resume"):
        require_space(later, 1 << 50)
    assert free_bytes(later) > 0
    assert not later.parent.exists()


def test_sizes_are_readable() -> None:
    assert [as_size(size) for size in (0, 1023, 1536, 5 << 20, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB"]
