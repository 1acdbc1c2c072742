"""Everything the actors of one run are built from: data, handed to each of them whole."""

import os
from pathlib import Path

from msgspec import Struct

from asyncrl.config import Deployment, Recipe
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir, write_atomic


class RunPlan(Struct, frozen=True, kw_only=True):
    """What one start of a run does, and where."""

    recipe: Recipe  # as checked, `{run}` resolved
    deployment: Deployment
    run_dir: str
    started: int  # when the driver started the run, in ns since the epoch
    loopback: bool  # everything runs on this machine, and its sockets bind to 127.0.0.1
    resume_at: int | None = None  # the checkpoint (updates) to start from; None: the newest complete one
    stop_token_ids: tuple[int, ...] = ()

    @property
    def paths(self) -> RunDir:
        return RunDir(self.run_dir)

    def incarnation(self, restart_count: int) -> int:
        """An actor's incarnation for the store: rises with restarts of the actor, and of the driver by the driver's clock."""
        return self.started + restart_count

    def mark_start(self) -> None:
        """Writes the moment of this start into the run directory, where every actor must be able to read it."""
        write_atomic(self._mark, str(self.started))

    def check_reach(self) -> None:
        """Raises ConfigError on a node that does not see the run directory that the driver writes."""
        if not self._mark.is_file() or self._mark.read_text() != str(self.started):
            raise ConfigError(
                f"node {os.uname().nodename} does not see the run directory {self.run_dir} that the driver uses: checkpoints "
                "and logs would be lost there; put --runs-dir on a file system that all nodes share"
            )

    @property
    def _mark(self) -> Path:
        return self.paths.path / ".started"
