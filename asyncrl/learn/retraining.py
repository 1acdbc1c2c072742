"""A run's training once more, from its checkpoints and the batches of its log. No store, no bus, no generator.

checkpoint c ─► load ─► ┌ batch of update c + 1, from the log ─► update ─► its metrics ┐ ─► …
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from asyncrl.learn.past import PastBatches, said_made_on
from asyncrl.learn.snapshot import Difference, differences, made_on, restore
from asyncrl.learn.trainer import PolicyTrainer
from asyncrl.manifests import verify_manifest
from asyncrl.models.ranks import Ranks
from asyncrl.rundir import RunDir
from asyncrl.types import TrainRollout

log = logging.getLogger(__name__)

UNREPEATABLE = ("timing_s/", "perf/")  # metrics that begin so are of the clock or of the machine
TIMEOUT_S = 3600.0  # for the slowest rank


class UnlikeMetric(NamedTuple):
    """A metric of an update that is not, to the bit, what the log says."""

    update: int
    metric: str
    logged: float
    replayed: float


class PastRun:
    """The weights of a run as they were after any update since one of its starts: a checkpoint, or the model it began with.

    history: of the run. Every rank of several has one, and makes the same calls.
    """

    def __init__(self, run: RunDir, history: PastBatches, trainer: PolicyTrainer, ranks: Ranks | None = None) -> None:
        """trainer: as it was built from the run's recipe: those are the weights of update 0."""
        self.trainer = trainer
        self.committed = 0  # updates that the weights have had
        self._run = run
        self._history = history
        self._ranks = ranks or Ranks()

    def saves(self, update: int) -> bool:
        """Whether the checkpoint of an update is there: a run that goes on deletes some."""
        return self._run.checkpoint(update).is_dir()

    def load(self, update: int) -> None:
        """Takes the checkpoint of an update. The one of 0 may be gone: it is the trainer as it was built, and never left since.
        Raises CheckpointError for a damaged one; warns where it was made by other means than there are here."""
        folder = self._run.checkpoint(update)
        if not folder.is_dir() and update == self.committed == 0:
            return
        verify_manifest(folder)
        restore(self.trainer, folder, self._ranks)
        self.committed = update
        if self._ranks.first and (unlike := made_otherwise(self.trainer, folder, self._ranks)):
            log.warning("%s was made with %s: the last bits may differ", folder, unlike)

    def batch(self) -> list[TrainRollout]:
        """What the run trained next."""
        return self._history.rollouts(self._history.commits[self.committed + 1].groups)

    def step(self, rollouts: Sequence[TrainRollout]) -> dict[str, float]:
        """Makes the next update of its batch; returns its metrics."""
        metrics = self.trainer.update(rollouts, self.committed)
        self.committed += 1
        return metrics

    def unlike_metrics(self, metrics: Mapping[str, float]) -> tuple[list[UnlikeMetric], int]:
        """Those of the newest update that the log has otherwise, and how many were compared. What the log lacks, as it is of
        an older version, is not."""
        logged = self._history.commits[self.committed].metrics
        names = [name for name in metrics if repeatable(name) and name in logged]
        found = [UnlikeMetric(self.committed, name, logged[name], metrics[name]) for name in names]
        unlike = [of for of in found if of.logged != of.replayed and not (math.isnan(of.logged) and math.isnan(of.replayed))]
        return unlike, len(names)

    def unlike_weights(self) -> list[Difference]:
        """How weights, optimizers and figures differ from the run's own checkpoint of this update, which is there; of all
        ranks, for the first one of several, which waits for them."""
        found = list(differences(self.trainer, self._run.checkpoint(self.committed), self._ranks))
        if self._ranks.count > 1:
            about = f"differences/{self.committed}"
            self._ranks.tell(about, json.dumps(found))
            for rank in range(1, self._ranks.count) if self._ranks.first else ():
                found += [Difference(*of) for of in json.loads(self._ranks.heard(about, rank, TIMEOUT_S))]
        return found


def repeatable(name: str) -> bool:
    """Whether a metric depends on nothing but what is trained, and with what."""
    return not name.startswith(UNREPEATABLE)


def made_otherwise(trainer: PolicyTrainer, folder: Path, ranks: Ranks) -> str:
    """With what a checkpoint was made that is not so here; empty if it does not say."""
    now = made_on(trainer, ranks)
    then = said_made_on(folder)
    return ", ".join(f"{name} {then[name]} (here {value})" for name, value in now.items() if then.get(name, value) != value)
