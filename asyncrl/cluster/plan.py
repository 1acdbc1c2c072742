"""Everything the actors of one run are built from: data, handed to each of them whole."""

from pathlib import Path

from msgspec import Struct

from asyncrl.config import Deployment, Recipe
from asyncrl.rundir import RunDir


class RunPlan(Struct, frozen=True, kw_only=True):
    """recipe and deployment: as checked, `{run}` resolved. run_id names the run in log entries.

    started: when the driver started the run, in ns since the epoch. loopback: everything runs
    on this machine, and its sockets bind to 127.0.0.1. resume_at: the checkpoint (updates) to start from; None is the
    newest complete one.
    """

    recipe: Recipe
    deployment: Deployment
    run_dir: str
    run_id: str
    started: int
    loopback: bool
    resume_at: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def incarnation(self, restart_count: int) -> int:
        """An actor's incarnation for the store: rises with restarts of the actor, and of the driver by the driver's clock."""
        return self.started + restart_count

    @property
    def paths(self) -> RunDir:
        return RunDir(Path(self.run_dir))
