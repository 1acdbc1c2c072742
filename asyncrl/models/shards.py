"""verl's FSDP checkpoints, read tensor by tensor: no GPU, no process group, and no code from the files is run.

    global_step_N/actor/  model_world_size_W_rank_R.pt  a state dict of DTensors, and of plain tensors that every rank has
                          huggingface/ (configuration, tokenizer)  fsdp_config.json  optim_….pt  extra_state_….pt

FSDP1 and FSDP2 write the same: torch's DTensors, each with the mesh of ranks it is spread over and a placement per dimension
of that mesh. (verl 0.9, utils/checkpoint/fsdp_checkpoint_manager.py.)
"""

import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from asyncrl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_RANK = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt$")
_LATEST = "latest_checkpointed_iteration.txt"


def shards_folder(path: Path) -> Path | None:
    """The folder with the policy's shards, if `path` is that, its `global_step_N`, or verl's folder of a run (then its newest).

    Touches no file of weights. Raises ConfigError for a run's folder whose newest step is not there.
    """
    if (latest := path / _LATEST).is_file():
        path /= f"global_step_{latest.read_text().strip()}"
        if not path.is_dir():
            found = ", ".join(sorted(other.name for other in path.parent.glob("global_step_*"))) or "none"
            raise ConfigError(f"{latest} names {path.name}, which is not there; name a step's folder yourself: {found}")
    for folder in (path, path / "actor"):
        if any(folder.glob("model_world_size_*_rank_*.pt")):
            return folder
    return None


def shard_files(folder: Path) -> list[Path]:
    """The file of each rank, in order, after the folder's listing was found complete; no file of weights is opened.

    Raises CheckpointError: ranks missing, shards of several world sizes, no configuration; ConfigError: no policy.
    """
    found = {match: file for file in folder.iterdir() if (match := _RANK.match(file.name))}
    ranks = {int(match[2]): file for match, file in found.items()}
    worlds = {int(match[1]) for match in found}
    if (said := folder / "fsdp_config.json").is_file():
        worlds.add(_json(said)["world_size"])
    if len(worlds) > 1:
        raise CheckpointError(
            f"{folder} holds shards of, or says, world sizes {', '.join(map(str, sorted(worlds)))}: which of them belong "
            "together can't be known; keep the files of one save only"
        )
    (world,) = worlds
    if missing := sorted(set(range(world)) - ranks.keys()):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {world} ranks ({', '.join(map(str, missing[:8]))}): every node saved its own; "
            "copy all into one folder"
        )
    config = folder / "huggingface" / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{config} is missing: the architecture is unknown; put the base model's config.json and tokenizer files there"
        )
    kinds = _json(config).get("architectures") or []
    if any("Classification" in kind for kind in kinds):
        raise ConfigError(f"{folder} is a value model ({kinds[0]}), from which nothing generates; name the actor's folder")
    return [ranks[rank] for rank in range(world)]


class ShardedWeights(Mapping[str, "Tensor"]):
    """Whole tensors by name, each joined when asked for, out of mapped files: what is held is what the caller keeps.

    Every file is read once at the start, against its checksums. Raises CheckpointError: a damaged file, or one with more in it
    than tensors; ranks that don't fit together; a placement other than Replicate and Shard.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._folder = files[0].parent
        self._ranks = [_open(file) for file in files]
        for file, tensors in zip(files, self._ranks, strict=True):
            if other := tensors.keys() ^ self._ranks[0].keys():
                raise CheckpointError(f"{file} holds other tensors than rank 0: {len(other)} differ, e.g. {sorted(other)[:3]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks[0])

    def __len__(self) -> int:
        return len(self._ranks[0])

    def __getitem__(self, name: str) -> "Tensor":
        from torch.distributed.tensor import DTensor, Replicate, Shard

        pieces: list[Any] = [tensors[name] for tensors in self._ranks]
        first = pieces[0]
        if not isinstance(first, DTensor):
            return self._same(name, pieces)
        if any(not isinstance(p, DTensor) or (p.placements, p.shape) != (first.placements, first.shape) for p in pieces):
            raise CheckpointError(f"{name} is placed otherwise on some ranks of {self._folder}: they are of several saves")
        sharded = [placement.dim for placement in first.placements if type(placement) is Shard]
        if any(type(p) not in (Shard, Replicate) for p in first.placements) or len(set(sharded)) < len(sharded):
            raise CheckpointError(
                f"{name} is placed as {first.placements}: only Replicate, and Shard of a dimension once, can be joined; "
                "convert it with the verl that wrote it"
            )
        mesh = _mesh(first.device_mesh)
        if sorted(mesh.flatten().tolist()) != list(range(len(pieces))):
            raise CheckpointError(f"{name} is spread over ranks {mesh.tolist()} only, of {len(pieces)}: it can't be joined")
        whole = self._join(name, mesh, first.placements, [piece._local_tensor for piece in pieces])
        if whole.shape != first.shape:
            raise CheckpointError(f"{name}: the ranks' pieces make {tuple(whole.shape)}, it should be {tuple(first.shape)}")
        return whole

    def _join(self, name: str, mesh: "Tensor", placements: Sequence[Any], pieces: Sequence["Tensor"]) -> "Tensor":
        """The part of a tensor that the ranks in `mesh` hold, whose dimensions are those of `placements`."""
        import torch

        if not placements:
            return pieces[int(mesh)]
        parts = [self._join(name, line, placements[1:], pieces) for line in mesh]
        if placements[0].is_replicate():
            return self._same(name, parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=placements[0].dim)

    def _same(self, name: str, copies: Sequence["Tensor"]) -> "Tensor":
        if not all(same_bits(copies[0], other) for other in copies[1:]):
            raise CheckpointError(
                f"{name} is not the same on all ranks of {self._folder} that should hold a copy: they are of several "
                "saves, or were trained apart"
            )
        return copies[0]


def same_bits(one: "Tensor", other: "Tensor") -> bool:
    """Whether two tensors have one shape, dtype and content, bit by bit: NaN equals itself, 0 differs from -0."""
    import torch

    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy it again, or take another step") from error


def _open(file: Path) -> dict[str, "Tensor"]:
    """The state dict of one rank, mapped, after its checksums were compared."""
    import torch
    import torch.distributed.tensor  # allows DTensors to be loaded

    # It would warn once a tensor that there is no process group.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        kind = match[1] if (match := re.search(r"GLOBAL (\S+)", str(error))) else "something"
        raise CheckpointError(
            f"{file} holds {kind}, which is no tensor: loading it might run code, so that it is not loaded; if you trust it, "
            "save its tensors alone with the verl that wrote it"
        ) from error
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}); copy it again, or take another step") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file} is no state dict of tensors; name the folder that verl saved the policy in")
    return tensors


def _mesh(mesh: Any) -> "Tensor":
    """The ranks that a DTensor is spread over, a dimension per placement, as the torch that saved it wrote them down."""
    import torch

    state = vars(mesh)
    if "mesh" in state:  # torch up to 2.8
        return state["mesh"]
    try:
        layout = vars(state["_layout"])
        if "axes" in layout:  # torch 2.13
            return mesh.mesh
        return torch.as_strided(state["_rank_map"], layout["shape"], layout["stride"])  # torch 2.11
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"these shards are by a torch that writes down ranks in a way not known here ({error!r}): merge them with the "
            "torch that they were saved with"
        ) from error
