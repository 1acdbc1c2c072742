"""Checkpoints of the learner: everything that continuing to the bit needs, written atomically, found by verifying.

    checkpoints/step_000100/  policy/ (config.json, model.safetensors)  optimizer.pt  rng.pt  manifest.json
                              critic/ (model.safetensors, optimizer.pt), of runs that have one

Nothing in them is pickled code: tensors are safetensors, or loaded with `weights_only`. The schedule is a function of the
update count, and the place in the store's log is that count too, so neither needs a file.
"""

import logging
import random
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from asyncrl.errors import CheckpointError, Fenced
from asyncrl.learn.critic import Critic
from asyncrl.learn.policies import Refusal, newest_complete
from asyncrl.models.loading import load_weights, named_weights
from asyncrl.rundir import RunDir, atomic_folder, read_manifest, write_manifest
from asyncrl.types import Version

log = logging.getLogger(__name__)


class Checkpointed(Protocol):
    """What a checkpoint holds of a trainer."""

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    state: dict[str, float]  # its own figures, kept in the manifest

    @property
    def critic(self) -> Critic | None: ...


class Checkpoints:
    """The checkpoints of one run; at most keep_last_n stay. Its writer is the learner that holds the fence. One that does not
    know yet that it was fenced can leave a checkpoint, which the log then refuses, and deletes none: it asks the store before.
    """

    def __init__(self, run_dir: RunDir, keep_last_n: int) -> None:
        self._run_dir = run_dir
        self._keep_last_n = keep_last_n

    def save(self, trainer: Checkpointed, version: Version) -> Path:
        """Writes `step_<update>`, whole or not at all, and returns its folder. An older one of that name is replaced.

        Raises Fenced if a newer learner has written one of that name, DiskFull if there is no room.
        """
        model = trainer.model
        path = self._run_dir.checkpoint(version.update)
        with atomic_folder(path, _size_bytes(trainer)) as folder:
            _save_policy(model, folder / "policy")
            _save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
            _save(_rng_state(), folder / "rng.pt")
            if trainer.critic is not None:
                _save_critic(trainer.critic, folder / "critic")
            summary = {
                "type": model.config.model_type,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
            extra = {"update": version.update, "incarnation": version.incarnation, "model": summary, "state": trainer.state}
            write_manifest(folder, extra)
            if (newer := _incarnation(path)) > version.incarnation:
                raise Fenced(f"{path} is of learner incarnation {newer} > {version.incarnation}: a newer one took over; stop")
        return path

    def restore(self, trainer: Checkpointed, at: int | None = None, refusal: Refusal = lambda version: "") -> int | None:
        """Loads what `choose` chooses, and returns its update count; None in a run that has no checkpoint yet."""
        update = self.choose(at, refusal)
        if update is not None:
            self.load(trainer, update)
        return update

    def choose(self, at: int | None = None, refusal: Refusal = lambda version: "") -> int | None:
        """The update count of the newest checkpoint that is whole and not refused.

        at: takes the checkpoint after so many updates instead. refusal: why one of this version can't be gone on from, or "".
        None in a run that has none yet. Checkpoints that can't be used are skipped with a warning; nothing is deleted. Raises
        CheckpointError, which says why, if none can be used, or not the one of update `at`.
        """
        folders = self._run_dir.steps()
        if at is None and not folders:
            return None
        wanted, _ = newest_complete(folders, refusal) if at is None else self._only(at, folders, refusal)
        return self._run_dir.update_of(wanted)

    def load(self, trainer: Checkpointed, update: int) -> None:
        """Loads the checkpoint of an update, one that `choose` chose, random states included.

        Of the figures saved, those that the trainer has are overwritten in place, and others ignored. So is a critic where it
        has none; one that it has must be in the checkpoint.
        """
        wanted = self._run_dir.checkpoint(update)
        _, extra = read_manifest(wanted)
        load_weights(trainer.model, load_file(wanted / "policy" / "model.safetensors"))
        trainer.optimizer.load_state_dict(_load(wanted / "optimizer.pt"))
        if trainer.critic is not None:
            _load_critic(trainer.critic, wanted / "critic")
        _set_rng_state(_load(wanted / "rng.pt"))
        trainer.state |= {name: value for name, value in extra.get("state", {}).items() if name in trainer.state}

    def discard_after(self, update: int) -> None:
        """Deletes the checkpoints of later updates: the run goes on from `update`, and they belong to what was given up."""
        for folder in self._run_dir.steps():
            if self._run_dir.update_of(folder) > update:
                log.warning("deleting %s: the run goes on from update %d", folder, update)
                shutil.rmtree(folder)

    def oldest_kept(self, newest: int) -> int:
        """Update count of the oldest of the keep_last_n checkpoints up to `newest`. Later ones are not this learner's."""
        updates = [self._run_dir.update_of(folder) for folder in self._run_dir.steps()]
        return [update for update in updates if update <= newest][-self._keep_last_n :][0]

    def prune(self, oldest: int) -> None:
        """Deletes the checkpoints before `oldest`."""
        for folder in self._run_dir.steps():
            if self._run_dir.update_of(folder) < oldest:
                shutil.rmtree(folder)

    def _only(self, at: int, folders: list[Path], refusal: Refusal) -> tuple[Path, dict[str, Any]]:
        names = ", ".join(folder.name for folder in folders) or "none"
        wanted = self._run_dir.checkpoint(at)
        if wanted not in folders:
            raise CheckpointError(f"{wanted} does not exist; the run has {names}")
        try:
            return newest_complete([wanted], refusal)
        except CheckpointError as error:
            raise CheckpointError(f"{error}\nthe run has {names}") from error


def _size_bytes(trainer: Checkpointed) -> int:
    """Of the tensors of a checkpoint: weights and what the optimizers hold by now."""
    critic = trainer.critic
    modules = [trainer.model, *([critic.module] if critic is not None else [])]
    optimizers = [trainer.optimizer, *([critic.optimizer] if critic is not None else [])]
    moments = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in [*(p for module in modules for p in module.parameters()), *moments])


def _incarnation(folder: Path) -> int:
    """Of the learner that wrote a checkpoint; 0 if there is none, or it is damaged."""
    try:
        _, extra = read_manifest(folder)
    except CheckpointError:
        return 0
    return int(extra["incarnation"])


def _save_policy(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights under the names of `named_weights`, and the model's configuration."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _save_weights(model, folder)


def _save_weights(module: torch.nn.Module, folder: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in named_weights(module).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _save_critic(critic: Critic, folder: Path) -> None:
    folder.mkdir()
    _save_weights(critic.module, folder)
    _save(critic.optimizer.state_dict(), folder / "optimizer.pt")


def _load_critic(critic: Critic, folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.parent} holds no critic, but the recipe has one: untrained values would mislead a trained policy; resume "
            "with the run's own algorithm.adv_estimator, or export the policy and start a new run from it"
        )
    load_weights(critic.module, load_file(folder / "model.safetensors"))
    critic.optimizer.load_state_dict(_load(folder / "optimizer.pt"))


def _save(value: Any, path: Path) -> None:
    with path.open("wb") as file:  # of a path torch would not say why it can't be written
        torch.save(value, file)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss_next],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
