"""Manifests: what they say of files, and what they find missing or damaged."""

import json
from pathlib import Path

import pytest

from asyncrl.errors import CheckpointError
from asyncrl.manifests import file_sum, verify_manifest, write_manifest
from asyncrl.rundir import sha256


def test_manifest_round_trip(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/a.bin").write_bytes(b"abc")
    write_manifest(tmp_path, {"update": 7}, {"policy/a.bin": file_sum(tmp_path / "policy/a.bin")})
    assert verify_manifest(tmp_path) == {"update": 7}
    listed = json.loads((tmp_path / "manifest.json").read_text())["files"]
    # SHA-256 of "abc" is the standard's own test vector.
    assert listed == {
        "policy/a.bin": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    }
    assert sha256(tmp_path / "policy/a.bin") == listed["policy/a.bin"]["sha256"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").write_bytes(b"ab"), r"a\.bin has 2 bytes, its manifest says 3"),
        (lambda folder: (folder / "a.bin").write_bytes(b"abd"), r"a\.bin has SHA-256 \w{12}…, its manifest says ba7816bf8f01"),
        (lambda folder: (folder / "a.bin").unlink(), r"a\.bin is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), r"has no manifest\.json: its save was cut short"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, damage, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    write_manifest(tmp_path, {}, {"a.bin": file_sum(tmp_path / "a.bin")})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(tmp_path)
