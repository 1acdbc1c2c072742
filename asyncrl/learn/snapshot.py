"""What one rank saves of a trainer, and loads again: its pieces of weights and optimizer, its random state.

Nothing in the files is code: they are safetensors and JSON. Any number of ranks, in any layout, reads what any other wrote.
"""

import json
import math
import platform
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asyncrl.learn.optimizer import Optimization
from asyncrl.learn.policies import require_resumable
from asyncrl.manifests import FileSum, file_sum
from asyncrl.models.lora import adapter_texts, learned_pieces, require_adapters
from asyncrl.models.pieces import Piece, adamw_pieces, read_adamw, read_pieces, written
from asyncrl.models.ranks import Ranks
from asyncrl.models.shards import same_bits
from asyncrl.models.stored import StoredTensors

Content = tuple[dict[str, torch.Tensor], dict[str, str]]  # of a safetensors file: tensors by name, and metadata


class Checkpointed(Protocol):
    """What a checkpoint holds of a trainer."""

    trained: dict[str, Optimization]  # `policy`, `critic`: those of which this rank has a part; the first rank has the policy
    state: dict[str, float]  # its own figures, equal on all ranks


class Difference(NamedTuple):
    """What is not the same, to the bit, in a trainer and in a checkpoint."""

    name: str  # `policy/lm_head.weight`, `optimizer/policy/lm_head.weight.exp_avg`, `figures/kl_coef`
    largest: float  # of the absolute differences; infinite where only one of the two has it


class Snapshot:
    """A copy, in the host's memory, of what this rank saves: made by the thread that trains, written by another."""

    def __init__(self, trainer: Checkpointed, update: int, ranks: Ranks) -> None:
        own, of = ranks.index - ranks.start, ranks.layout.ranks
        self._tensors = {f"rng/{_file('rng', ranks.index, ranks.count)}": _random_state()}  # and metadata, by file
        self._texts = _texts(trainer, update, ranks) if ranks.first else {}
        for name, trained in trainer.trained.items():
            module, adamw = trained.module, trained.adamw
            self._tensors[f"{name}/{_file('model', own, of)}"] = copies_to_write(learned_pieces(module, ranks))
            self._tensors[f"optimizer/{name}/{_file('adamw', own, of)}"] = copies_to_write(adamw_pieces(adamw, module, ranks))
            if ranks.leads:
                self._texts[f"scheduler/{name}.json"] = _json({"update": update, "lr": adamw.param_groups[0]["lr"]})

    def write(self, folder: Path) -> dict[str, FileSum]:
        """Writes this rank's files into a folder that all ranks write to. They are on the disk then; returns their sums."""
        files = {name: content for name, content in self._tensors.items() if content[0]}
        for name in (*files, *self._texts):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, (tensors, metadata) in files.items():
            save_file(tensors, folder / name, metadata)
        for name, text in self._texts.items():
            (folder / name).write_text(text)
        return {name: file_sum(folder / name) for name in (*files, *self._texts)}


def restore(trainer: Checkpointed, folder: Path, ranks: Ranks) -> None:
    """Loads this rank's parts of a checkpoint, random state included. No rank waits for another.

    Of the figures saved, those that the trainer has are overwritten in place, and others ignored. So is a critic where it has
    none; one that it has must be in the checkpoint. Raises CheckpointError if it is of another model, or parts are missing.
    """
    require_resumable(folder, *trainer.trained)
    for name, trained in trainer.trained.items():
        module, adamw = trained.module, trained.adamw
        require_adapters(module, folder / name)
        read_pieces(learned_pieces(module, ranks), StoredTensors(folder / name), name)
        read_adamw(adamw, module, StoredTensors(folder / "optimizer" / name), ranks)
    figures = json.loads((folder / "training_state.json").read_text())["figures"]
    trainer.state |= {name: value for name, value in figures.items() if name in trainer.state}
    states = sorted((folder / "rng").iterdir())  # more ranks than there were begin with states that others have, too
    _set_random_state(states[ranks.index % len(states)])


@torch.no_grad()
def differences(trainer: Checkpointed, folder: Path, ranks: Ranks) -> Iterator[Difference]:
    """What this rank's part of a checkpoint has otherwise than the trainer: weights, optimizer, figures. Copies no more than a
    tensor at a time. No rank waits for another."""
    for name, trained in trainer.trained.items():
        optimizer = adamw_pieces(trained.adamw, trained.module, ranks)
        for what, pieces in ((name, learned_pieces(trained.module, ranks)), (f"optimizer/{name}", optimizer)):
            stored = StoredTensors(folder / what)
            for missing in sorted(stored.keys() ^ {piece.name for piece in pieces}):
                yield Difference(f"{what}/{missing}", math.inf)
            for piece in (piece for piece in pieces if piece.name in stored):
                own = piece.local.cpu()
                stored.read_into(there := torch.empty_like(own), piece.name, piece.offsets)
                if not same_bits(own, there):
                    yield Difference(f"{what}/{piece.name}", float((own.double() - there.double()).abs().max()))
    figures = json.loads((folder / "training_state.json").read_text())["figures"]
    for name, value in trainer.state.items():
        if value != figures.get(name):
            yield Difference(f"figures/{name}", abs(value - figures.get(name, math.inf)))


def made_on(trainer: Checkpointed, ranks: Ranks) -> dict[str, Any]:
    """On what an update is computed: what decides over its last bits, besides what goes in."""
    gpu = next(trainer.trained["policy"].module.parameters()).device.type == "cuda"
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "layouts": msgspec.to_builtins(ranks.layouts),
    }


def size_bytes(trainer: Checkpointed) -> int:
    """Of the tensors of a checkpoint, those of models of which this rank has a part: weights and optimizers."""
    trained = trainer.trained.values()
    moments = [value for of in trained for state in of.adamw.state.values() for value in state.values()]
    weights = [p for of in trained for p in of.module.parameters() if p.requires_grad]
    return sum(tensor.nbytes for tensor in [*weights, *moments])


def copies_to_write(pieces: Sequence[Piece]) -> Content:
    """Copies, in the host's memory, of those that this rank writes; and where they stand in their wholes, if they are none."""
    own = written(pieces)
    parts = {piece.name: (piece.shape, piece.offsets) for piece in own if piece.local.shape != piece.shape}
    tensors = {piece.name: torch.empty(piece.local.shape, dtype=piece.local.dtype).copy_(piece.local) for piece in own}
    return tensors, {"format": "pt"} | ({"pieces": json.dumps(parts)} if parts else {})


def _texts(trainer: Checkpointed, update: int, ranks: Ranks) -> dict[str, str]:
    """Content of the files that hold no tensor, by name."""
    model = trainer.trained["policy"].module
    said = {"update": update, "ranks": ranks.count, "figures": trainer.state, "made_on": made_on(trainer, ranks)}
    texts = {"training_state.json": _json(said)}
    texts["policy/config.json"] = model.config.to_json_string()
    if model.generation_config is not None:
        texts["policy/generation_config.json"] = model.generation_config.to_json_string()
    return texts | {f"policy/{name}": text for name, text in adapter_texts(model).items()}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _file(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}_rank_{index:05d}_of_{count:05d}.safetensors"


def _random_state() -> Content:
    name, keys, *of_numpy = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors = {f"cuda.{device}": state for device, state in enumerate(cuda)}
    tensors |= {"torch": torch.get_rng_state(), "python": torch.tensor(internal)}
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return tensors, {"others": json.dumps({"python": [version, gauss_next], "numpy": [name, *of_numpy]})}


def _set_random_state(file: Path) -> None:
    tensors = load_file(file)
    with safe_open(file, framework="numpy") as header:
        others = json.loads(header.metadata()["others"])
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("cuda.")]
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    name, *of_numpy = others["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *of_numpy))
    version, gauss_next = others["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))
