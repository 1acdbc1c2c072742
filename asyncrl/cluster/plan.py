"""Everything the actors of one run are built from: data, handed to each of them whole."""

import logging
import os
import time
from pathlib import Path

from msgspec import Struct

from asyncrl.config import Deployment, Recipe, RewardTerm
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir, write_atomic
from asyncrl.staleness import Staleness

_RESTARTS = 10**9  # of one actor in one start of the run, at the most; as ns, a second


class RunPlan(Struct, frozen=True, kw_only=True):
    """What one start of a run does, and where."""

    recipe: Recipe  # as checked, `{run}` resolved
    deployment: Deployment
    run_dir: str
    started: int  # `next_start` of the run directory
    loopback: bool  # everything runs on this machine, and its sockets bind to 127.0.0.1
    resume_at: int | None = None  # the checkpoint (updates) to start from; None: the newest complete one
    stop_token_ids: tuple[int, ...] = ()
    log_level: int = logging.INFO  # of the driver: actors log from there on, or as LOG_LEVEL says, whichever tells more

    @property
    def paths(self) -> RunDir:
        return RunDir(self.run_dir)

    @property
    def models(self) -> dict[str, RewardTerm]:
        """What the actors that serve models of rewards are called, and the term of each."""
        count = self.deployment.rewards.models.count
        return {f"model-{number}.{i}": term for number, term in enumerate(self.recipe.reward.served) for i in range(count)}

    @property
    def staleness(self) -> Staleness:
        """The rule, for as many engines as there are."""
        generators = self.deployment.generators
        return self.recipe.staleness_rule(generators.slots, generators.least)

    def incarnation(self, restart_count: int) -> int:
        """An actor's incarnation for the store: rises with restarts of the actor, and of the driver."""
        return self.started + restart_count

    def mark_start(self) -> None:
        """Writes this start into the run directory, where every actor must be able to read it, and the next start too."""
        write_atomic(_mark(self.paths), str(self.started))

    def check_reach(self) -> None:
        """Raises ConfigError on a node that does not see the run directory that the driver writes."""
        mark = _mark(self.paths)
        if not mark.is_file() or mark.read_text() != str(self.started):
            raise ConfigError(
                f"node {os.uname().nodename} does not see the run directory {self.run_dir} that the driver uses: checkpoints "
                "and logs would be lost there; put --runs-dir on a file system that all nodes share"
            )


def next_start(paths: RunDir) -> int:
    """Numbers a start of a run, in ns since the epoch: above every actor's incarnation of the starts before it in this
    directory, whatever the clock says, so that the store takes nobody for a zombie."""
    mark = _mark(paths)
    last = int(mark.read_text()) if mark.is_file() else 0
    return max(time.time_ns(), last + _RESTARTS)


def _mark(paths: RunDir) -> Path:
    return paths.path / ".started"
