"""Joining shards made by hand: placements that verl never writes, and ranks that do not fit together."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from asyncrl.errors import CheckpointError
from asyncrl.models.shards import ShardedWeights, _mesh, same_bits

WHOLE = torch.arange(35.0).view(5, 7)
LINE, SQUARE = [0, 1, 2, 3], [[0, 1], [2, 3]]
ROWS, COLUMNS, BOTH = Shard(0), Shard(1), Replicate()


def piece(local: torch.Tensor, ranks: list, placements: tuple, shape: torch.Size = WHOLE.shape) -> DTensor:
    """One rank's part of a tensor that lay on GPUs, as `torch.load` gives it back."""
    mesh = DeviceMesh("cuda", ranks, _init_backend=False, _rank=0)
    meta = TensorMeta(shape, torch.empty(shape).stride(), local.dtype)
    return DTensor(local.clone(), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def save(folder: Path, ranks: list[dict]) -> list[Path]:
    files = [folder / f"model_world_size_{len(ranks)}_rank_{rank}.pt" for rank in range(len(ranks))]
    for file, tensors in zip(files, ranks, strict=True):
        torch.save(tensors, file)
    return files


def read(folder: Path, parts: list, ranks: list = LINE, placements: tuple = (ROWS,)) -> torch.Tensor:
    return ShardedWeights(save(folder, [{"w": piece(part, ranks, placements)} for part in parts]))["w"]


GRID = [part for rows in WHOLE.split([3, 2]) for part in rows.split([4, 3], dim=1)]
HALVES = list(WHOLE.split([3, 2]))


@pytest.mark.parametrize(
    ("ranks", "placements", "parts"),
    [
        (LINE, (ROWS,), [*WHOLE.split(2), torch.empty(0)]),  # FSDP2 gives a rank without rows a tensor without dimensions
        (LINE, (COLUMNS,), list(WHOLE.split(2, dim=1))),
        (LINE, (BOTH,), [WHOLE] * 4),
        (SQUARE, (BOTH, ROWS), HALVES * 2),
        (SQUARE, (ROWS, BOTH), [HALVES[0], HALVES[0], HALVES[1], HALVES[1]]),
        (SQUARE, (ROWS, COLUMNS), GRID),
        ([[0, 2], [1, 3]], (ROWS, COLUMNS), [GRID[0], GRID[2], GRID[1], GRID[3]]),
    ],
    ids=["uneven", "columns", "replicated", "hybrid", "hybrid, other order", "grid", "grid of ranks in other order"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_join_to_the_whole_tensor(tmp_path, ranks, placements, parts, dtype):
    assert same_bits(read(tmp_path, [part.to(dtype) for part in parts], ranks, placements), WHOLE.to(dtype))


@pytest.mark.parametrize(
    ("ranks", "placements", "parts", "said"),
    [
        (LINE, (Partial(),), [WHOLE] * 4, "only Replicate, and Shard of a dimension once, can be joined"),
        (SQUARE, (_StridedShard(0, split_factor=2), ROWS), HALVES * 2, "only Replicate, and Shard of a dimension once"),
        (SQUARE, (ROWS, ROWS), HALVES * 2, "only Replicate, and Shard of a dimension once"),
        (SQUARE, (BOTH, ROWS), [*HALVES, HALVES[0], HALVES[1] + 1], "not the same on all ranks"),
        ([0, 1], (ROWS,), HALVES * 2, "spread over ranks [0, 1] only, of 4"),
        (LINE, (ROWS,), HALVES * 2, "the ranks' pieces make (10, 7), it should be (5, 7)"),
    ],
)
def test_what_cannot_be_joined_for_sure_is_refused(tmp_path, ranks, placements, parts, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read(tmp_path, parts, ranks, placements)


def test_plain_tensors_are_what_every_rank_has(tmp_path):
    bits = torch.tensor([float("nan"), -0.0])
    assert same_bits(ShardedWeights(save(tmp_path, [{"w": bits}] * 2))["w"], bits)
    with pytest.raises(CheckpointError, match="w is not the same on all ranks"):
        ShardedWeights(save(tmp_path, [{"w": bits}, {"w": bits.abs()}]))["w"]
    with pytest.raises(CheckpointError, match="w is placed otherwise on some ranks"):
        ShardedWeights(save(tmp_path, [{"w": piece(HALVES[0], [0, 1], (ROWS,))}, {"w": HALVES[1]}]))["w"]


def test_ranks_with_other_tensors_or_none_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"rank_1.pt holds other tensors than rank 0: 2 differ, e.g. \['v', 'w'\]"):
        ShardedWeights(save(tmp_path, [{"w": WHOLE}, {"v": WHOLE}]))
    with pytest.raises(CheckpointError, match="no state dict of tensors"):
        ShardedWeights(save(tmp_path, [{"w": {"step": 3}}]))


@pytest.mark.parametrize(
    "state",
    [
        {"mesh": torch.tensor(SQUARE)},
        {"_rank_map": torch.arange(4), "_layout": SimpleNamespace(shape=(2, 2), stride=(2, 1))},
    ],
    ids=["torch up to 2.8", "torch 2.11"],
)
def test_meshes_of_older_torch_are_read(state):
    assert _mesh(SimpleNamespace(**state)).tolist() == SQUARE


def test_a_mesh_of_an_unknown_torch_is_refused():
    with pytest.raises(CheckpointError, match="in a way not known here"):
        _mesh(SimpleNamespace(_layout=SimpleNamespace(sizes=(2,))))
