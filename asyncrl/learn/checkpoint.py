"""Checkpoints of a run: written in the background by all ranks together, whole or absent, found by verifying.

step_000100/  policy/ critic/        weights (or adapters alone), and the policy's configuration
              optimizer/{policy,critic}/  scheduler/  rng/ (a file per rank)
              training_state.json    the trainer's own figures
              manifest.json          version, model, and the sums of all files

The thread that trains makes a Snapshot, a copy in the host's memory, and goes on; a helper thread writes it (learn.together).
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from asyncrl.errors import CheckpointError, Fenced
from asyncrl.learn.policies import Refusal, newest_complete
from asyncrl.learn.snapshot import Checkpointed, Snapshot, restore, size_bytes
from asyncrl.learn.together import write_together
from asyncrl.manifests import read_manifest, write_manifest
from asyncrl.models.ranks import Ranks
from asyncrl.rundir import RunDir, sweep
from asyncrl.types import Version

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, as one of its ranks sees them. Every rank saves and loads all of them, in the same order.

    The newest keep_last_n stay, those of updates that are multiples of keep_every (but for 0), and those saved by hand.
    on_whole: what the first rank does, in its helper thread, with the version of a checkpoint that is on the disk.

    Their writer is the learner that holds the fence. One that does not know yet that it was fenced can leave a checkpoint,
    which the log then refuses, and deletes none: it asks the store before.
    """

    def __init__(self, run_dir: RunDir, keep_last_n: int, keep_every: int | None = None, ranks: Ranks | None = None) -> None:
        self.on_whole: Callable[[Version], None] = lambda version: None
        self._run_dir = run_dir
        self._keep_last_n = keep_last_n
        self._keep_every = keep_every
        self._ranks = ranks or Ranks()
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saves = 0  # so far: the same on all ranks

    # -------------------------------------------------------------------------------------------- writing

    def save(self, trainer: Checkpointed, version: Version, by_hand: bool = False) -> Path:
        """Begins to write `step_<update>`, and returns its folder, which is there when it is whole: see `wait`.

        Waits for the save before, and copies; training may go on when it returns. An older checkpoint of that name is replaced
        in the end. Raises what the save before raised. by_hand: it is never pruned.
        """
        self.wait()
        extra: dict[str, Any] = {"update": version.update, "incarnation": version.incarnation, "by_hand": by_hand}
        if self._ranks.first:
            extra["model"] = _summary(trainer.trained["policy"].module)
        self._saves += 1
        snapshot = Snapshot(trainer, version.update, self._ranks)
        self._writing = self._helper.submit(self._write, snapshot, extra, size_bytes(trainer))
        return self._run_dir.checkpoint(version.update)

    def wait(self) -> None:
        """Waits until the save under way is whole on the disk, and counts. Raises Fenced if a newer learner has written one
        of that name, DiskFull if there is no room, or whatever else went wrong: then nothing of it is left."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raises what went wrong with the save under way, if that has shown; waits for nothing. From any thread."""
        if (writing := self._writing) is not None and writing.done():
            writing.result()

    def _write(self, snapshot: Snapshot, extra: dict[str, Any], size_bytes: int) -> None:
        path, began, ours = self._run_dir.checkpoint(extra["update"]), time.monotonic(), extra["incarnation"]

        def finish(folder: Path, files: dict[str, Any]) -> None:
            write_manifest(folder, extra, files)
            if (newer := _extra(path).get("incarnation", 0)) > ours:
                raise Fenced(f"{path} is of learner incarnation {newer} > {ours}: a newer one took over; stop")

        write_together(path, self._ranks, self._ranks.count, f"checkpoint/{self._saves}", snapshot.write, finish, size_bytes)
        if self._ranks.first:
            log.info("%s is on the disk, %.1f s after it was begun", path, time.monotonic() - began)
            self.on_whole(Version(ours, extra["update"]))

    # -------------------------------------------------------------------------------------------- loading

    def restore(self, trainer: Checkpointed) -> int | None:
        """Loads the newest checkpoint that is whole, and returns its update count; None in a run that has none yet."""
        if (update := self.choose()) is not None:
            self.load(trainer, update)
        return update

    def choose(self, at: int | None = None, refusal: Refusal = lambda version: "") -> int | None:
        """The update count of the newest checkpoint that is whole and not refused, for all ranks to load.

        at: takes the checkpoint after so many updates instead. refusal: why one of this version can't be gone on from, or "".
        None in a run that has none yet. Checkpoints that can't be used are skipped with a warning; nothing is deleted. Raises
        CheckpointError, which says why, if none can be used, or not the one of update `at`; ConfigError if that is not there.
        """
        if at is None and not self._run_dir.steps():
            return None
        _, extra = newest_complete(self._run_dir, at, refusal)
        return int(extra["update"])

    def load(self, trainer: Checkpointed, update: int) -> None:
        """Loads this rank's part of the checkpoint of an update, which `choose` chose. No rank waits for another."""
        restore(trainer, self._run_dir.checkpoint(update), self._ranks)

    # -------------------------------------------------------------------------------------------- keeping

    def discard_after(self, update: int) -> None:
        """Deletes the checkpoints of later updates, but for those saved by hand: the run goes on from `update`, and they belong
        to what was given up. So does what a learner that was killed has half written."""
        sweep(self._run_dir.checkpoints)
        for folder in self._run_dir.steps():
            if self._run_dir.update_of(folder) > update and not _extra(folder).get("by_hand"):
                log.warning("deleting %s: the run goes on from update %d", folder, update)
                shutil.rmtree(folder)

    def oldest_kept(self, newest: int) -> int:
        """Update count of the oldest of the keep_last_n checkpoints up to `newest`: those that can be gone on from."""
        updates = [self._run_dir.update_of(folder) for folder in self._run_dir.steps()]
        return [update for update in updates if update <= newest][-self._keep_last_n :][0]

    def prune(self, oldest: int) -> None:
        """Deletes the checkpoints before `oldest`, but for those that stay for ever."""
        for folder in self._run_dir.steps():
            update = self._run_dir.update_of(folder)
            for_ever = update > 0 and self._keep_every is not None and update % self._keep_every == 0
            if update < oldest and not for_ever and not _extra(folder).get("by_hand"):
                shutil.rmtree(folder)


def _summary(model: Any) -> dict[str, Any]:
    """What a checkpoint's manifest says of the policy."""
    return {
        "type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _extra(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing if there is none, or it is damaged."""
    try:
        return read_manifest(folder)[1]
    except CheckpointError:
        return {}
