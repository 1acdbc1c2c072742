"""What a run has left of its past: its checkpoints, and the batches of its log. No torch."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from asyncrl.errors import CheckpointError, ConfigError, DataError
from asyncrl.manifests import read_manifest
from asyncrl.rundir import RunDir
from asyncrl.types import TrainRollout, Version

log = logging.getLogger(__name__)


class TrainedBatch(Protocol):
    """A batch that was trained."""

    groups: tuple[int, ...]
    version: Version
    metrics: dict[str, float]


class PastBatches(Protocol):
    """What a run's log tells: replay.log.history.RunHistory. Its verbs raise DataError for rows that are gone."""

    commits: Any  # TrainedBatch by update

    def rollouts(self, groups: Sequence[int]) -> list[TrainRollout]: ...

    def holds(self, groups: Sequence[int]) -> bool: ...


def own_checkpoints(run: RunDir, history: PastBatches) -> list[int]:
    """Updates of the checkpoints of a run's surviving lineage. One saved by hand may be of another."""
    found = []
    for folder in run.steps():
        update = run.update_of(folder)
        try:
            incarnation = read_manifest(folder)[1].get("incarnation")
        except CheckpointError as error:
            log.warning("skipping %s: %s", folder, error)
            continue
        if not update or (update in history.commits and history.commits[update].version.incarnation == incarnation):
            found.append(update)
    return found


def choose_updates(run: RunDir, history: PastBatches, begin: int | None, end: int | None) -> tuple[int, int]:
    """The update whose checkpoint is gone on from, and the last update to make. begin: None: the oldest from which all rows
    are there. end: None: the newest update. Raises ConfigError or DataError, which names what is missing."""
    newest = max(history.commits, default=0)
    if end is not None and not 0 < end <= newest:
        raise ConfigError(f"--to {end}: the log of {run.path} holds updates 1 to {newest}; name one of them, or leave it out")
    end = end or newest
    if not end:
        raise DataError(f"{run.path}: no update is in its log: there is nothing to train again; let it run first")
    made = own_checkpoints(run, history)
    if begin is not None and begin != 0 and begin not in made:
        there = ", ".join(map(str, made)) or "none"
        raise ConfigError(
            f"--from {begin}: {run.path} has no checkpoint of it; it has {there}, and 0 is the model it began with"
        )
    oldest_first = sorted({*made, 0}, key=lambda update: (update not in made, update))
    starts = [update for update in (oldest_first if begin is None else [begin]) if update < end]
    if not starts:
        raise ConfigError(f"--from {begin} --to {end}: there is no update between them; name an earlier checkpoint than --to")
    batches = {update: commit.groups for update, commit in history.commits.items()}
    for start in starts:
        if history.holds([group for update in range(start + 1, end + 1) for group in batches[update]]):
            return start, end
    gone = [update for update in range(starts[-1] + 1, end + 1) if not history.holds(batches[update])]
    raise DataError(
        f"{run.path}: rows of updates {gone[0]} to {gone[-1]} are deleted, as store.keep_bytes says, so updates up to {end} "
        f"can't be trained again from {starts[-1]}; name a later checkpoint with --from (there are {', '.join(map(str, made))})"
    )


def said_made_on(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of what it was made on (learn.snapshot.made_on); nothing if it is of an earlier version."""
    return dict(json.loads((folder / "training_state.json").read_text()).get("made_on", {}))
