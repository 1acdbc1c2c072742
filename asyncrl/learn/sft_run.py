"""A warm start under way: its metrics, its checkpoints, the held-out loss."""

import math
import time
import zlib
from collections.abc import Callable, Sequence

from asyncrl.config import SFTSpec
from asyncrl.errors import ConfigError
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.sft import SupervisedTrainer
from asyncrl.models.packed import TokenSequence
from asyncrl.models.ranks import Ranks
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.report.trackers import RunFacts, Trackers
from asyncrl.rundir import RunDir
from asyncrl.types import Record, Version

Observe = Callable[[int, int, dict[str, float]], None]  # step, of how many, its metrics


class Journal:
    """`start` once, then `step` after each. Metrics that were written before an interruption are not written twice.

    Every rank has one, for their checkpoints are made by all; the first one writes and tells the rest.
    """

    def __init__(
        self,
        spec: SFTSpec,
        work: RunDir,
        trainer: SupervisedTrainer,
        examples: Sequence[TokenSequence],
        heldout: Sequence[TokenSequence],
        observe: Observe | None,
        ranks: Ranks,
    ) -> None:
        self._spec = spec
        self._trainer = trainer
        self._heldout = heldout
        self._observe = observe
        self._checkpoints = Checkpoints(work, keep_last_n=1, ranks=ranks)
        self._checkpoints.on_whole = lambda version: self._checkpoints.prune(version.update)
        facts = RunFacts.of(work.path.name, str(work.path), work.metrics.exists(), spec)
        self._metrics = MetricsLog(work.metrics, Trackers(("tensorboard",), facts)) if ranks.first else None
        trainer.state |= {"examples": float(_digest(examples)), "first_heldout": math.nan}
        self.loss = self.last_heldout = math.nan  # of the newest batch; of held-out examples

    def start(self) -> int:
        """Restores the newest checkpoint, if there is one, and returns the steps done. Raises ConfigError if data changed."""
        state = self._trainer.state
        examples = state["examples"]
        done = self._checkpoints.restore(self._trainer)
        if done is None:
            if self._heldout:
                self.last_heldout = state["first_heldout"] = self._trainer.loss(self._heldout)
                self._write(0, {"heldout/loss": self.last_heldout})
            return 0
        if state["examples"] != examples:
            raise ConfigError(
                f"{', '.join(self._spec.data.files)} or the tokenizer changed since the checkpoint of step {done}: the rest "
                "would be other data in another order; put the old files back, or start over with --force"
            )
        if self._metrics is not None:
            self._checkpoints.discard_after(done)
        return done

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Takes the figures of a step; measures and saves where it is time to."""
        last = step == self._trainer.total_steps
        self.loss = figures["loss"]
        self._checkpoints.check()
        metrics = {f"train/{name}": value for name, value in figures.items()}
        if self._heldout and (last or step % self._spec.eval_freq == 0):
            metrics["heldout/loss"] = self.last_heldout = self._trainer.loss(self._heldout)
        self._write(step, metrics)
        if self._spec.save_freq and step % self._spec.save_freq == 0 and not last:
            self._checkpoints.save(self._trainer, Version(0, step))

    def close(self) -> None:
        """Waits for the checkpoint under way."""
        if self._metrics is not None:
            self._metrics.close()
        self._checkpoints.wait()

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self._metrics is None:
            return
        # a sequence number starts at 1, and step 0 may have a line too
        version = Version(0, step)
        self._metrics.append(Record(sequence=step + 1, time=time.time(), kind="step", version=version, metrics=metrics))
        if self._observe is not None:
            self._observe(step, self._trainer.total_steps, metrics)


def _digest(examples: Sequence[TokenSequence]) -> int:
    """A checksum of tokens and what is learned of them, small enough for a float."""
    digest = 0
    for ids, scored, _ in examples:
        digest = zlib.crc32(scored.tobytes(), zlib.crc32(ids.tobytes(), digest))
    return digest
