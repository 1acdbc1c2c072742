"""What every process of the learner's group serves. Each verb is called on all ranks at once, in the same order, by `Gang`."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from asyncrl.interfaces import Tensors
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.parallel.pulse import Pulse
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.loading import export
from asyncrl.models.lora import merged_pieces
from asyncrl.models.ranks import Ranks
from asyncrl.rundir import atomic_folder
from asyncrl.types import TrainRollout, Version


class Rank:
    """This process's part of the training: its share of every update, of every checkpoint, and of what is published."""

    def __init__(
        self, trainer: PolicyTrainer, checkpoints: Checkpoints, tokenizer: PreTrainedTokenizerBase, ranks: Ranks | None = None
    ) -> None:
        """ranks: where this process stands; None: it is the only one."""
        self._trainer = trainer
        self.checkpoints = checkpoints
        self._tokenizer = tokenizer
        self._ranks = ranks or Ranks()
        self.pulse = Pulse(lambda: trainer.packs)

    def update(self, rollouts: Sequence[TrainRollout], committed: int) -> dict[str, float]:
        """Makes update `committed + 1` of the rollouts that all ranks get, and returns metrics that are equal on all. Raises
        NonFinite, then on all."""
        return self._trainer.update(rollouts, committed)

    def save(self, version: Version, by_hand: bool = False) -> Path:
        """Begins to write this rank's part of a checkpoint of this version; returns its folder, as `Checkpoints.save` does."""
        return self.checkpoints.save(self._trainer, version, by_hand)

    def load(self, update: int) -> None:
        """Takes weights, optimizer and random states from the checkpoint of an update, which `Checkpoints.choose` chose."""
        self.checkpoints.load(self._trainer, update)

    def weights(self) -> Tensors:
        """The policy's weights by name, whole, to be published; none on ranks other than the first."""
        pieces = merged_pieces(self._trainer.model, self._ranks) if self._ranks.first else []
        return {piece.name: piece.read() for piece in pieces}

    def export(self, folder: str) -> None:
        """Writes the current policy as a Hugging Face folder, tokenizer included."""
        if self._ranks.first:
            with atomic_folder(folder) as beside:
                export(self._trainer.model, self._tokenizer, beside)
