"""asyncrl from Python: `launch(recipe, deployment)` for a whole run, `Trainer` for one that is led step by step."""

import contextlib
import inspect
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from asyncrl.cluster.objects import recipe_of
from asyncrl.cluster.plan import RunPlan, next_start
from asyncrl.cluster.preflight import check_resumed, check_run
from asyncrl.cluster.preparation import prepare_run, save_functions
from asyncrl.config import Deployment, Recipe
from asyncrl.config.paths import resolve_paths
from asyncrl.control import Requests, Scale, Stop, Stopping
from asyncrl.errors import ConfigError, DiskFull, SentinelFired
from asyncrl.processes import aside, undisturbed
from asyncrl.report.callbacks import CallbackQueue, Callbacks
from asyncrl.report.followed import write_end
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.report.progress import Progress
from asyncrl.report.summary import RunResult, RunSummary
from asyncrl.report.trackers import RunFacts, Trackers
from asyncrl.rundir import log_shown, resolve_run_dir
from asyncrl.types import Record

if TYPE_CHECKING:
    from asyncrl.cluster.lookout import Lookout
    from asyncrl.cluster.supervisor import Supervisor

log = logging.getLogger(__name__)
ACTORS_EVERY_S = 5.0  # between two lines of kind `actors` in metrics.jsonl

Observer = Callable[[RunSummary], None]


class Trainer:
    """One run: its directory, its actors, its checkpoints. A context manager; `close` stops every actor.

    resume_from: this run's directory (its newest checkpoint that is whole and in its log), or one of its checkpoints, as a
    folder or by its update count.
    Without it a run directory that holds an earlier run is set aside as `previous-N`, and only its `data` stays.
    observe: called about twice a second with the run's summary, always the same object. callbacks: what else is to be told,
    and when. progress: whether `fit` shows how it goes on: a live view on a terminal or in a notebook, else a line every few
    seconds, on standard error. The log goes there too, from INFO or LOG_LEVEL on, unless the program has set up logging itself.

    Raises ConfigError or DataError before any actor starts; what can be checked is checked before Ray is imported.
    """

    def __init__(
        self,
        recipe: Recipe,
        deployment: Deployment | None = None,
        *,
        name: str = "",
        runs_dir: str | Path = "runs",
        resume_from: str | Path | int | None = None,
        observe: Observer | None = None,
        callbacks: Callbacks | None = None,
        progress: bool = True,
    ) -> None:
        self.paths = resolve_run_dir(name or recipe.name, runs_dir)
        if resume_from is not None:
            self.paths.require_checkpoint(resume_from if isinstance(resume_from, int) else None)
        self._deployment = deployment or Deployment()
        self._recipe = resolve_paths(recipe, self.paths)
        self._summary = RunSummary(name=self.paths.path.name, total_steps=recipe.total_steps, starting=True)
        self._observer = observe
        self._show_progress = progress
        self._progress: Progress | None = None  # while `fit` goes on
        self._lookout: Lookout | None = None  # where there are sentinels
        self._began = self._actors_due = time.monotonic()
        self._scalings = 0  # decisions that are in metrics.jsonl
        self._error: BaseException | None = None  # that the run ended with
        self._stopping = Stopping()
        self._halting = False
        self._resources = contextlib.ExitStack()
        try:
            self._resources.enter_context(log_shown())
            check_run(self._recipe, self._deployment, self.paths)
            self._resources.enter_context(self.paths.lock())
            self._requests = Requests(self.paths, {Stop: self._stopping.take, Scale: self._scale})
            self.paths.ended.unlink(missing_ok=True)
            self._resources.callback(lambda: write_end(self.paths, self._summary.committed, self._error))
            resume_at = None if resume_from is None else self._update_of(resume_from)
            if resume_from is not None:
                check_resumed(self._recipe, self.paths, resume_at)
            self._recipe = save_functions(self._recipe, self.paths)
            self._callbacks = CallbackQueue(callbacks or Callbacks(), self.paths)
            prepared = self._prepare(resuming=resume_from is not None)
            self._supervisor = self._start(resume_at, prepared)
        except BaseException as error:
            self._error = error
            self._resources.close()
            raise

    @classmethod
    def from_objects(
        cls, model: Any, tokenizer: Any, dataset: Any, reward: Any, *, eval_dataset: Any = None, **settings: Any
    ) -> "Trainer":
        """A run of what a program has at hand. It is otherwise the same: the objects are written into the run's `data/objects`,
        from where actors load them and the run can be resumed, also by its `recipe.json` alone.

        model: a PreTrainedModel of transformers, a Hugging Face id, a folder, or a ModelSpec.
        tokenizer: one of transformers, an id or a folder; None for the own one of a model that is named.
        dataset, eval_dataset: a list of dicts, `datasets.Dataset`, DataFrame, pyarrow Table, or files; with the columns that
        `data` names, of which one in which only TRL's functions are to look needs none but `prompt`.
        reward: a function by verl's convention or TRL's, its name, a RewardTerm, several of these, or a RewardSpec.
        settings: the other fields of a `Recipe` (`total_steps`, `learner`, `sampling`, …; as specs or mappings, `data` without
        its files) and the keywords of `Trainer`.

        Raises ConfigError or DataError for what is of no known kind, before any actor starts.
        """
        own = inspect.signature(cls).parameters
        run = {key: settings.pop(key) for key in list(settings) if key in own and key != "name"}
        paths = resolve_run_dir(settings.get("name", "run"), run.get("runs_dir", "runs"))
        return cls(recipe_of(paths.data / "objects", model, tokenizer, dataset, reward, eval_dataset, settings), **run)

    def fit(self, steps: int | None = None) -> RunResult:
        """Trains `steps` further updates (None: up to the recipe's total_steps). Blocks; evaluation at the end included.

        KeyboardInterrupt leaves it when the update under way is made and saved, and says where and, in a note, how to go on; a
        second one at once. What a callback raises leaves it in the same way.
        """
        total = self._recipe.total_steps
        until = total if steps is None else min(self._summary.committed + steps, total)
        with self._shown(), self._resumable():
            self._supervisor.train(until)
            if self._lookout is not None:
                self._lookout.drain()
                self._between()
        return self.result()

    def scale(self, generators: int | None = None, rewards: int | None = None, learner: int | None = None) -> None:
        """States how many generators, reward workers and ranks of the learner there should be from now on; None: as before.
        From any thread, and from callbacks. Returns at once: actors come, and go when they have finished what they hold; the
        learner saves and starts anew. A count with min and max is the run's own no more. Raises ConfigError for what can't be.
        """
        self._supervisor.scale({"generator": generators, "reward": rewards, "learner": learner})

    def finish(self) -> RunResult:
        """Ends the run cleanly: what is still outstanding is settled as unused, and nobody is left waiting."""
        with self._resumable():
            self._supervisor.finish()
        return self.result()

    def result(self) -> RunResult:
        """How the run stands."""
        return self._summary.result(str(self.paths.path), time.monotonic() - self._began)

    def evaluate(self) -> dict[str, float]:
        """Scores the present weights on the held-out prompts, between two `fit`s, and returns the metrics. Blocks until every
        response has its verdict. Weights that were evaluated already are not evaluated again.

        Raises ConfigError without evaluation.files, and after `finish`.
        """
        if not self._recipe.evaluation.files:
            raise ConfigError("evaluate without evaluation.files (from_objects: eval_dataset): there are no held-out prompts")
        with self._shown(), self._resumable():
            self._supervisor.evaluate()
        return dict(self._summary.evals[self.global_step].metrics)

    @property
    def global_step(self) -> int:
        """Updates made and committed."""
        return self._summary.committed

    @property
    def learning_rate(self) -> float | None:
        """The policy's, in the newest update that this Trainer has seen; None before the first."""
        return self._summary.metrics.get("actor/lr")

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint of the updates so far, between two `fit`s, and returns its folder."""
        return Path(self._supervisor.ask_learner("save_checkpoint"))

    def load_checkpoint(self, checkpoint: str | Path | int) -> None:
        """Goes back to one of this run's checkpoints, named by its folder or its update count. Updates after it are reopened:
        their batches are trained again first."""
        self._supervisor.restart_learner(self._update_of(checkpoint))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the policy as a Hugging Face folder, whole or not at all; with its tokenizer and chat template."""
        self._supervisor.ask_learner("export", str(Path(folder).absolute()))
        return Path(folder)

    def close(self) -> None:
        """Stops every actor, and Ray if this run started it. Idempotent."""
        self._resources.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._error = error
        self.close()

    # ------------------------------------------------------------------------------------------------------

    def _update_of(self, checkpoint: str | Path | int) -> int | None:
        """Which checkpoint of this run is meant; None, the newest, for the run directory itself."""
        folder = self.paths.checkpoint(checkpoint) if isinstance(checkpoint, int) else Path(checkpoint).resolve()
        if folder == self.paths.path:
            return None
        if folder in self.paths.steps():
            return self.paths.update_of(folder)
        found = ", ".join(step.name for step in self.paths.steps()) or "none"
        raise ConfigError(
            f"{folder} is no checkpoint of the run in {self.paths.path} (it has: {found}); resume a run in its own directory"
        )

    @contextlib.contextmanager
    def _resumable(self) -> Iterator[None]:
        """An interrupt inside, a sentinel that stops, and what a callback raises, are raised when a checkpoint is written, and
        say from where the run can be resumed."""
        try:
            yield
        except KeyboardInterrupt:
            interrupt = KeyboardInterrupt(self._halt("interrupted"))
            interrupt.add_note(self._way_on)
            raise interrupt from None
        except SentinelFired as fired:
            stopped = SentinelFired(f"{fired}\n{self._halt('a sentinel fired')}")
            stopped.add_note(self._way_on)
            raise stopped from None
        except Exception as error:
            if error is self._callbacks.failure:
                error.add_note(f"{self._halt('a callback raised an error')}\n{self._way_on}")
            raise

    @property
    def _way_on(self) -> str:
        return f"to go on: Trainer(…, resume_from={str(self.paths.path)!r}), or launch(…, resume=True)"

    def _halt(self, why: str) -> str:
        """Ends the learner's work with a checkpoint, and says which."""
        limit_s = self._deployment.limits.save_timeout_s
        if not self._stopping.at_once:
            log.warning("%s: saving, once the update under way is made; limits.save_timeout_s=%g", why, limit_s)
        self._halting = True
        self._supervisor.halt()
        made, newest = self._summary.committed, self.paths.steps()[-1]
        if self.paths.update_of(newest) < made:
            return f"{newest} is the newest checkpoint; the updates since, up to {made}, will be made again from the log"
        return f"update {made} is saved in {newest}"

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        if not self._show_progress:
            yield
            return
        with contextlib.closing(Progress()) as self._progress:
            try:
                yield
            finally:
                self._progress = None

    def _prepare(self, resuming: bool) -> Callable[[], tuple[int, ...]]:
        """Begins `prepare_run`, and returns what waits for its end. A program that has neither torch nor threads yet is spared
        what that imports, 4 s and 500 MB: it runs aside, while Ray starts."""
        prepare = partial(prepare_run, self._recipe, self._deployment, self.paths, resuming=resuming)
        if "torch" in sys.modules or "ray" in sys.modules or threading.active_count() > 1:
            stop_token_ids = prepare()
            return lambda: stop_token_ids
        return self._resources.enter_context(aside(partial(prepare, aside=True)))

    def _start(self, resume_at: int | None, prepared: Callable[[], tuple[int, ...]]) -> "Supervisor":
        # Here, as Ray takes a second to import, and a mistake is told before. Python would ignore an interrupt that falls into
        # the end of an import.
        with undisturbed():
            from asyncrl.cluster.gauges import RayGauges
            from asyncrl.cluster.session import ray_session
            from asyncrl.cluster.supervisor import Supervisor

        loopback = self._resources.enter_context(ray_session(self._deployment))
        stop_token_ids = prepared()
        facts = RunFacts.of(
            self.paths.path.name, str(self.paths.path), bool(self.paths.steps()), self._recipe, self._deployment
        )
        endpoint = {} if loopback else {"prometheus": RayGauges}  # a Ray of the run's own has nobody who would ask
        self._metrics = MetricsLog(self.paths.metrics, Trackers(self._deployment.trackers, facts, endpoint))
        self._resources.callback(self._metrics.close)
        self._resources.enter_context(contextlib.suppress(DiskFull))  # which is told already
        self._resources.callback(self._write_actors)
        log.info("starting the actors")
        plan = RunPlan(
            recipe=self._recipe,
            deployment=self._deployment,
            run_dir=str(self.paths.path),
            started=next_start(self.paths),
            loopback=loopback,
            resume_at=resume_at,
            stop_token_ids=stop_token_ids,
            log_level=logging.getLogger("asyncrl").getEffectiveLevel(),
        )
        plan.mark_start()
        supervisor = Supervisor(plan, self._summary, self._observe, self._between)
        self._resources.callback(supervisor.close)
        if self._recipe.sentinels:
            from asyncrl.cluster.lookout import Lookout

            self._lookout = self._resources.enter_context(contextlib.closing(Lookout(self._recipe.sentinels, self.paths)))
        found = self.paths.steps()
        supervisor.start()
        self._summary.starting = False
        if found:
            self._tell_resumed(found)
        return supervisor

    def _tell_resumed(self, found: Sequence[Path]) -> None:
        """found: the checkpoints there were before."""
        groups = self._summary.reports["store"].gauges["store/reopened"]
        again = math.ceil(groups / self._recipe.learner.batch_groups)
        said = "resumed from %s: %d later batches are trained again first, from the log"
        log.info(said, self.paths.checkpoint(self._summary.committed).name, again)
        for folder in found:
            if self.paths.update_of(folder) > self._summary.committed:
                log.warning("%s was given up; logs/learner.log says why", folder.name)

    def _observe(self, records: Sequence[Record]) -> None:
        """Called by the supervisor after each round: keeps the figures in metrics.jsonl, and shows the run's state."""
        now = time.monotonic()
        self._summary.elapsed_s = now - self._began
        new = [record for record in records if self._metrics.append(record)]
        self._callbacks.note(self._summary.counts, new)
        if self._lookout is not None:
            self._lookout.note(new)
        if self._progress is not None:
            self._progress.update(self._summary)
        for scaling in self._summary.scalings[self._scalings :]:
            self._metrics.append_scaling(scaling)
        self._scalings = len(self._summary.scalings)
        if now >= self._actors_due:
            self._write_actors()
            self._actors_due = now + ACTORS_EVERY_S
        if self._observer is not None:
            self._observer(self._summary)
        if self._halting:
            self._requests.look()
            if self._stopping.at_once:
                raise KeyboardInterrupt

    def _between(self) -> None:
        """Called by the supervisor between two rounds, where what is raised ends the run in order."""
        self._callbacks.run()
        self._requests.look()
        if self._stopping.asked:
            raise KeyboardInterrupt
        if self._lookout is not None:
            self._lookout.settle(self._supervisor.save_soon, self._summary.fired)

    def _scale(self, request: Scale) -> str:
        self.scale(request.generators, request.rewards, request.learner)
        return f"from update {self._summary.committed} on: {request.said()}"

    def _write_actors(self) -> None:
        if self._summary.reports:
            run = self._summary
            self._metrics.append_actors(time.time(), run.committed, run.reports.values(), run.restarts)


def launch(
    recipe: Recipe,
    deployment: Deployment | None = None,
    *,
    name: str = "",
    runs_dir: str | Path = "runs",
    resume: bool | int = False,
    observe: Observer | None = None,
    callbacks: Callbacks | None = None,
    progress: bool = True,
) -> RunResult:
    """Runs a recipe to its total_steps and returns what it came to. Raises what went wrong first.

    resume: True goes on from the run's newest checkpoint that is whole and in its log; a number, from the checkpoint after so
    many updates. observe, callbacks, progress: as of a `Trainer`.
    """
    resume_from: Path | int | None = None if resume is False else resume
    if resume is True:
        resume_from = resolve_run_dir(name or recipe.name, runs_dir).path
    with Trainer(
        recipe,
        deployment,
        name=name,
        runs_dir=runs_dir,
        resume_from=resume_from,
        observe=observe,
        callbacks=callbacks,
        progress=progress,
    ) as trainer:
        trainer.fit()
        return trainer.finish()
