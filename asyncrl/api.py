"""asyncrl from Python: `launch(recipe, deployment)` for a whole run, `Trainer` for one that is led step by step."""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec
import yaml
from msgspec import Struct

from asyncrl.cluster import preflight, wiring
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.session import RaySession
from asyncrl.cluster.supervisor import Supervisor
from asyncrl.config import Deployment, Recipe
from asyncrl.config.callables import load_callable
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import ConfigError
from asyncrl.report.summary import RunSummary
from asyncrl.rundir import RunDir, redact, resolve_run_dir, write_atomic
from asyncrl.types import RunStatus

log = logging.getLogger(__name__)


class RunResult(Struct, frozen=True, kw_only=True):
    """What a run came to; `asyncrl run` prints it as its one line of JSON.

    samples: rollouts trained. first_score, last_score: `eval/score` of the first and the last evaluation. The last four
    describe staleness: the largest lag of a trained token, the share of tokens masked for being too old, mean length of
    trained over dispatched answers, and the share of wall clock that the learner computed.
    """

    run_dir: str
    steps: int
    samples: int
    wall_s: float
    first_score: float | None
    last_score: float | None
    trained: int
    filtered: int
    evicted: int
    failed: int
    pending: int
    restarts: dict[str, int]
    max_trained_lag: int
    masked_share: float
    trained_length_ratio: float | None
    learner_utilization: float


Observer = Callable[[RunStatus, RunSummary], None]


class Trainer:
    """One run: its directory, its actors, its checkpoints. A context manager; `close` stops every actor.

    resume_from: this run's directory (its newest complete checkpoint) or one of its checkpoint folders.
    Without it a run directory that holds an earlier run is set aside as `previous-N`, and only its `data` stays.
    observe: called about twice a second with what the actors say, and with the running tally.

    Raises ConfigError or DataError before any actor starts.
    """

    def __init__(
        self,
        recipe: Recipe,
        deployment: Deployment | None = None,
        *,
        name: str = "",
        runs_dir: str | Path = "runs",
        resume_from: str | Path | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.paths = resolve_run_dir(name or recipe.name, runs_dir)
        if resume_from is not None:
            self.paths.require_checkpoint()
        self._deployment = deployment or Deployment()
        self._recipe = resolve_paths(recipe, self.paths)
        self._began = time.monotonic()
        self._resources = contextlib.ExitStack()
        try:
            preflight.check(self._recipe, self._deployment, self.paths)
            self._resources.enter_context(self.paths.lock())
            if resume_from is not None:
                _require_same_groups(self.paths, self._recipe)
            resume_at = None if resume_from is None else self._update_of(Path(resume_from).resolve())
            stop_token_ids = self._prepare(resuming=resume_from is not None)
            self._tally = RunSummary(self.paths, observe)
            self._resources.callback(self._tally.close)
            self._supervisor = self._start(resume_at, stop_token_ids)
        except BaseException:
            self._resources.close()
            raise

    def fit(self, steps: int | None = None) -> RunResult:
        """Trains `steps` further updates (None: up to the recipe's total_steps). Blocks; evaluation at the end included."""
        total = self._recipe.total_steps
        until = total if steps is None else min(self._tally.committed + steps, total)
        self._supervisor.train(until)
        return self.result()

    def finish(self) -> RunResult:
        """Ends the run cleanly: what is still outstanding is settled as evicted, and nobody is left waiting."""
        self._supervisor.finish()
        return self.result()

    def result(self) -> RunResult:
        """How the run stands."""
        tally, counts = self._tally, self._tally.counts
        return RunResult(
            run_dir=str(self.paths.path),
            steps=tally.committed,
            samples=tally.samples,
            wall_s=round(time.monotonic() - self._began, 2),
            first_score=tally.first_score,
            last_score=tally.last_score,
            trained=counts.trained,
            filtered=counts.filtered,
            evicted=counts.evicted,
            failed=counts.failed,
            pending=counts.pending,
            restarts=self._supervisor.restarts,
            max_trained_lag=tally.max_trained_lag,
            masked_share=tally.masked_share,
            trained_length_ratio=tally.trained_length_ratio,
            learner_utilization=tally.learner_utilization,
        )

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint of the updates so far, between two `fit`s, and returns its folder."""
        return Path(self._supervisor.ask_learner("save_checkpoint"))

    def load_checkpoint(self, folder: str | Path) -> None:
        """Goes back to one of this run's checkpoints. Updates after it are reopened: their batches are trained again first."""
        self._supervisor.restart_learner(self._update_of(Path(folder).resolve()))

    def export(self, folder: str | Path) -> Path:
        """Writes the policy as a Hugging Face folder; with its tokenizer and chat template."""
        self._supervisor.ask_learner("export", str(Path(folder).absolute()))
        return Path(folder)

    def close(self) -> None:
        """Stops every actor, and Ray if this run started it. Idempotent."""
        self._resources.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------

    def _update_of(self, folder: Path) -> int | None:
        """Which checkpoint of this run a folder is; None, the newest, for the run directory itself."""
        if folder == self.paths.path:
            return None
        for step in self.paths.steps():
            if step == folder:
                return int(step.name.removeprefix("step_"))
        found = ", ".join(step.name for step in self.paths.steps()) or "none"
        raise ConfigError(
            f"{folder} is no checkpoint of the run in {self.paths.path} (it has: {found}); resume a run in its own directory"
        )

    def _prepare(self, *, resuming: bool) -> tuple[int, ...]:
        """Makes data and prompts, then the run directory; an earlier run moves aside only when the new one can start.

        Returns the tokens that end an answer.
        """
        recipe = self._recipe
        if recipe.prepare:
            log.info("preparing what is not there yet: %s", recipe.prepare)
            load_callable(recipe.prepare, "prepare")(recipe, self.paths.path)
        stop_token_ids = wiring.prepare_prompts(recipe, self.paths, resuming)
        if not resuming:
            _set_aside(self.paths)
            self.paths.create()
        write_atomic(self.paths.recipe, msgspec.json.format(msgspec.json.encode(redact(recipe)), indent=2))
        write_atomic(self.paths.deployment, yaml.safe_dump(redact(self._deployment), sort_keys=False))
        return stop_token_ids

    def _start(self, resume_at: int | None, stop_token_ids: tuple[int, ...]) -> Supervisor:
        log.info("starting the actors")
        session = self._resources.enter_context(RaySession(self._deployment))
        plan = RunPlan(
            recipe=self._recipe,
            deployment=self._deployment,
            run_dir=str(self.paths.path),
            run_id=wiring.run_id(self.paths),
            started=wiring.mark_start(self.paths),
            loopback=session.loopback,
            resume_at=resume_at,
            stop_token_ids=stop_token_ids,
        )
        supervisor = Supervisor(plan, self._tally.observe)
        self._resources.callback(supervisor.close)
        supervisor.start()
        return supervisor


def launch(
    recipe: Recipe,
    deployment: Deployment | None = None,
    *,
    name: str = "",
    runs_dir: str | Path = "runs",
    resume: bool = False,
    observe: Observer | None = None,
) -> RunResult:
    """Runs a recipe to its total_steps and returns what it came to. Raises what went wrong first."""
    resume_from = resolve_run_dir(name or recipe.name, runs_dir).path if resume else None
    with Trainer(recipe, deployment, name=name, runs_dir=runs_dir, resume_from=resume_from, observe=observe) as trainer:
        trainer.fit()
        return trainer.finish()


def _require_same_groups(paths: RunDir, recipe: Recipe) -> None:
    """Refuses to resume with other prompts, order or group size: groups in the log would be finished with strangers."""
    before = msgspec.json.decode(paths.recipe.read_bytes(), type=Recipe)
    for name, old, new in (
        ("seed", before.seed, recipe.seed),
        ("data", before.data, recipe.data),
        ("sampling.n", before.sampling.n, recipe.sampling.n),
        ("a baseline per group (adv_estimator='remax')", before.algorithm.wants_baseline, recipe.algorithm.wants_baseline),
    ):
        if old != new:
            raise ConfigError(
                f"resuming {paths.path} with {name}={new!r}, but it began with {old!r}: groups in its log would be finished "
                "with other prompts; resume with the old value, or start anew under another --name"
            )


def _set_aside(paths: RunDir) -> None:
    """Moves what an earlier run left into `previous-N`; prepared data stays, as the cache that it is."""
    earlier = (paths.replay, paths.checkpoints, paths.metrics, paths.tensorboard, paths.logs, paths.exports)
    used = [path for path in earlier if path.is_file() or (path.is_dir() and any(path.iterdir()))]
    if not used:
        return
    numbers = [int(match[1]) for path in paths.path.iterdir() if (match := re.fullmatch(r"previous-(\d+)", path.name))]
    number = 1 + max(numbers, default=0)
    aside = paths.path / f"previous-{number}"
    aside.mkdir()
    for path in [*used, paths.recipe, paths.deployment]:
        if path.exists():
            shutil.move(path, aside / path.name)
