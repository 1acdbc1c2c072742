"""Tensors in safetensors files: pieces put together, read in part, and what is wrong with them named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from asyncrl.errors import CheckpointError
from asyncrl.models.stored import StoredTensors

WHOLE = torch.arange(35.0).view(5, 7)
GRID = {(0, 0): (3, 4), (3, 0): (2, 4), (0, 4): (3, 3), (3, 4): (2, 3)}  # where blocks begin, and their shapes


def write(file: Path, blocks: dict[tuple[int, int], tuple[int, int]], shape: tuple[int, ...] = (5, 7), **others) -> None:
    """A block of `WHOLE` as `w`; several only where they are the only one of their file."""
    for number, ((top, left), (height, width)) in enumerate(blocks.items()):
        part = WHOLE[top : top + height, left : left + width].contiguous()
        name = file if len(blocks) == 1 else file.with_name(f"{file.stem}_{number}.safetensors")
        save_file({"w": part, **others}, name, {"pieces": json.dumps({"w": (shape, (top, left))})})


def test_pieces_are_put_together_and_whole_tensors_read_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "part.safetensors", GRID)
    others = {"scalar": torch.tensor(3.0), "none": torch.zeros(0), "half": torch.ones(2).bfloat16()}
    save_file(others, tmp_path / "whole.safetensors")
    stored = StoredTensors(tmp_path)
    assert set(stored) == {"w", *others}
    assert stored.shapes == {"w": (5, 7), "scalar": (), "none": (0,), "half": (2,)}
    assert torch.equal(stored["w"], WHOLE)
    for name, tensor in others.items():
        assert torch.equal(stored[name], tensor)
        assert stored[name].dtype == tensor.dtype


@pytest.mark.parametrize(("offsets", "shape"), [((1, 2), (3, 4)), ((0, 0), (5, 7)), ((4, 6), (1, 1)), ((2, 0), (0, 7))])
def test_any_part_is_read_out_of_any_pieces(tmp_path: Path, offsets, shape) -> None:
    write(tmp_path / "part.safetensors", GRID)
    target = torch.full(shape, torch.nan)
    StoredTensors(tmp_path).read_into(target, "w", offsets)
    (top, left), (height, width) = offsets, shape
    assert torch.equal(target, WHOLE[top : top + height, left : left + width])


def remove(folder: Path) -> None:
    (folder / "part_1.safetensors").unlink()


def overlap(folder: Path) -> None:
    write(folder / "other.safetensors", {(2, 3): (2, 2)})


def cut(folder: Path) -> None:
    file = folder / "part_2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def mix(folder: Path) -> None:
    write(folder / "part_3.safetensors", {(3, 4): (2, 3)}, shape=(5, 8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove,
            r"w in .*: 8 of 35 elements are missing: only part_0\.safetensors, part_2.*, part_3.* have a part of it",
        ),
        (overlap, r"w in .*: other\.safetensors and part_0\.safetensors both have a part of it, from \(2, 3\) and \(0, 0\) on"),
        (cut, r"part_2\.safetensors is damaged or cut short \(.*\); use an older checkpoint"),
        (mix, r"w has shape \(5, 8\) by .*part_3\.safetensors, but \(5, 7\) by .*part_0\.\w+: they are of several saves"),
    ],
)
def test_what_is_missing_doubled_or_damaged_is_named(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "part.safetensors", GRID)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        StoredTensors(tmp_path)
