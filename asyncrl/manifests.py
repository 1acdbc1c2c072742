"""What a folder of files says of them, in `manifest.json`: whether all are there, and as they were written. No torch."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from asyncrl.errors import CheckpointError
from asyncrl.rundir import sha256, sync, write_atomic

MANIFEST = "manifest.json"


class FileSum(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def file_sum(path: Path) -> FileSum:
    """Of a file that this process wrote: when it returns, the file is on the disk."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(folder: str | Path, extra: Mapping[str, Any], files: Mapping[str, FileSum]) -> None:
    """Writes `manifest.json`, last: the files under `folder` with their sums, and `extra` (JSON values)."""
    content = {"schema": 1, "files": dict(sorted(files.items())), "extra": dict(extra)}
    write_atomic(Path(folder) / MANIFEST, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: str | Path) -> tuple[dict[str, FileSum], dict[str, Any]]:
    """What a manifest says of its files, which are not looked at, and `extra`. Raises CheckpointError if it can't be read."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return dict(manifest["files"]), dict(manifest["extra"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {MANIFEST}: its save was cut short; use an older checkpoint") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error}); use an older checkpoint") from error


def verify_manifest(folder: str | Path, sums: bool = True) -> dict[str, Any]:
    """Checks every file named by the manifest and returns `extra`. Raises CheckpointError naming file, bytes or hash.

    sums: reads them all, several at once; else only their sizes are looked at.
    """
    folder = Path(folder)
    files, extra = read_manifest(folder)
    with ThreadPoolExecutor() as readers:
        for problem in readers.map(lambda name: _damage(folder / name, files[name], sums), files):
            if problem:
                raise CheckpointError(f"{problem}; use an older checkpoint")
    return extra


def _damage(path: Path, expected: FileSum, sums: bool) -> str:
    if not path.is_file():
        return f"{path} is missing, but the manifest lists it"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} has {size} bytes, its manifest says {expected['bytes']}"
    if sums and (found := sha256(path)) != expected["sha256"]:
        return f"{path} has SHA-256 {found[:12]}…, its manifest says {expected['sha256'][:12]}…"
    return ""
