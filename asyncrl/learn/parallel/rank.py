"""What every process of the learner's group serves. Each verb is called on all ranks at once, in the same order, by `Gang`."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.parallel.pulse import Pulse
from asyncrl.learn.together import export_together
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.models.layout import DTYPES
from asyncrl.models.memory import FlatTensors, Place
from asyncrl.models.ranks import Ranks
from asyncrl.models.staging import Staging
from asyncrl.types import TrainRollout, Version


class Rank:
    """This process's part of the training: its share of every update, of every checkpoint, and of what is published."""

    def __init__(
        self,
        trainer: PolicyTrainer,
        checkpoints: Checkpoints,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks | None = None,
        bus_dtype: str = "",
    ) -> None:
        """ranks: where this process stands; None: it is the only one. bus_dtype: in which weights travel; "": their own."""
        self._trainer = trainer
        self.checkpoints = checkpoints
        self._tokenizer = tokenizer
        self._ranks = ranks or Ranks()
        dtype = DTYPES[bus_dtype] if bus_dtype else None
        self._policy = trainer.model if self._ranks.holds("learner") else None
        self._staging = Staging(self._policy, self._ranks, dtype=dtype) if self._policy else None
        self.count = self._ranks.count  # ranks of the learner
        self._exports = 0  # so far: the same on all ranks
        self.pulse = Pulse(lambda: trainer.packs)

    @cached_property
    def holds(self) -> dict[str, float]:
        """What this rank keeps between updates, as gauges."""
        return self._trainer.holds()

    def update(self, rollouts: Sequence[TrainRollout], committed: int) -> dict[str, float]:
        """Makes update `committed + 1` of the rollouts that all ranks get, and returns metrics that are equal on all. Raises
        NonFinite, then on all."""
        return self._trainer.update(rollouts, committed)

    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """What the policy gives the tokens of a response. Changes nothing."""
        return self._trainer.logprobs_of(prompt_ids, response_ids)

    def save(self, version: Version, by_hand: bool = False) -> Path:
        """Begins to write this rank's part of a checkpoint of this version; returns its folder, as `Checkpoints.save` does."""
        return self.checkpoints.save(self._trainer, version, by_hand)

    def load(self, update: int) -> None:
        """Takes weights, optimizer and random states from the checkpoint of an update, which `Checkpoints.choose` chose."""
        self.checkpoints.load(self._trainer, update)

    def staged(self, what: str, write: Callable[[Place], object] | None = None) -> FlatTensors:
        """The policy's weights, adapters included, whole and sealed, to be published. write: `write` of all ranks."""
        assert self._staging is not None, "asked of a rank without the policy"
        return self._staging.staged(what, write)

    def write(self, place: Place) -> None:
        """Writes this rank's part of the weights that are being staged."""
        if self._staging is not None:
            self._staging.write(place)

    def export(self, folder: str) -> None:
        """Writes the current policy as a Hugging Face folder, adapters merged, tokenizer included; without one nothing."""
        self._exports += 1
        if self._policy is not None:
            export_together(self._policy, self._tokenizer, Path(folder), self._ranks, f"export/{self._exports}")
