"""`asyncrl run RECIPE`: the main job. Everything that can be known to fail, fails before an actor starts."""

import argparse
import contextlib
import os
import shlex
import signal
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from asyncrl.api import launch
from asyncrl.cluster.preflight import check_resumed, check_run
from asyncrl.config import Deployment, Recipe
from asyncrl.config.load import load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.jobs.detach import detach, tell_ready
from asyncrl.processes import ENDING
from asyncrl.report.progress import Progress
from asyncrl.report.summary import RunResult, RunSummary
from asyncrl.rundir import RAY_JOB_ENV, RunDir, redact, resolve_run_dir

if TYPE_CHECKING:
    from asyncrl.report.samples import RolloutSample


def run_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl run`, and sets what runs."""
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file that sets `recipe = Recipe(…)`, or a run's recipe.json")
    parser.add_argument("--deploy", metavar="SPEC", help="a deployment YAML file (default: this machine, as deploy/local.yaml)")
    parser.add_argument("--name", default="", help="name of the run (default: the recipe's)")
    parser.add_argument("--runs-dir", default="runs", metavar="D", help="folder of run directories (default: runs)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from this run's newest checkpoint that is whole and in its log; `--resume 150`: from that of update 150",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--detach", action="store_true", help="go on without this terminal; returns when the run is up")
    parser.add_argument("--ready", type=int, default=None, help=argparse.SUPPRESS)  # for `detach`
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="fields to change, e.g. learner.lr=1e-5")
    parser.set_defaults(job=_run)


def _run(args: argparse.Namespace) -> int:
    """Runs the recipe. Standard output gets one line of JSON at the end; everything else goes to standard error."""
    file, overrides, resume = _resume(args)
    recipe, deployment = load_specs(file, args.deploy, overrides)
    paths = resolve_run_dir(args.name or recipe.name, args.runs_dir)
    recipe = resolve_paths(recipe, paths, Path(file).parent)
    if resume is not False and (args.dry_run or args.detach):  # else `launch` asks for it
        check_resumed(recipe, paths, None if resume is True else resume)
    if args.dry_run:
        print("\n".join(check_run(recipe, deployment, paths)))
        return 0
    if args.detach:
        if RAY_JOB_ENV in os.environ:
            raise ConfigError("--detach in a Ray job, which ends with this command: use `ray job submit --no-wait` instead")
        check_run(recipe, deployment, paths)
        return detach([sys.executable, "-m", "asyncrl.cli", *_words(args, file, overrides, resume)], paths)

    run_shown(recipe, deployment, paths, resume, _words(args, file, overrides, True), args.ready)
    return 0


def run_shown(
    recipe: Recipe, deployment: Deployment, paths: RunDir, resume: bool | int, again: list[str], ready: int | None = None
) -> None:
    """Runs the recipe as the command does: progress on standard error, one line of JSON on standard output, and in the end a
    signal means a checkpoint. again: the words after `asyncrl` that go on with it. ready: a pipe that hears when it is up."""
    # Ray tells of every death in a paragraph of guesses; the supervisor has a line. Read when ray is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")
    _at_interrupt(_end_in_order)
    watch = _Watch(ready, paths)
    try:
        # A recipe's `prepare` prints, and so does Ray.
        with contextlib.redirect_stdout(sys.stderr), contextlib.closing(watch.progress):
            result = launch(
                recipe,
                deployment,
                name=paths.path.name,
                runs_dir=paths.path.parent,
                resume=resume,
                observe=watch,
                progress=False,
            )
    except (AsyncRLError, KeyboardInterrupt) as error:
        if (run := watch.progress.newest) is not None:  # before, there is nothing to go on with
            error.__notes__ = [f"to go on: {shlex.join(['asyncrl', *again])}"]
            if isinstance(error, AsyncRLError):
                _tell(replace(run.result(str(paths.path), run.elapsed_s), error=redact(str(error))))
        raise
    finally:
        _at_interrupt(signal.SIG_DFL)  # nothing is left to be ended in order
    _tell(result)


def _words(args: argparse.Namespace, file: str, overrides: list[str], resume: bool | int) -> list[str]:
    """What to write after `asyncrl` for the same run."""
    options = {"--deploy": args.deploy, "--name": args.name, "--runs-dir": "" if args.runs_dir == "runs" else args.runs_dir}
    words = ["run", file, *overrides, *(word for option, value in options.items() if value for word in (option, value))]
    return words if resume is False else [*words, "--resume", *([] if resume is True else [str(resume)])]


class _Watch:
    """What the command does with a run's state: shows it and, where it was detached, tells by a pipe that the run is up."""

    def __init__(self, ready: int | None, paths: RunDir) -> None:
        self.progress = Progress(partial(newest_samples, paths))
        self._ready = ready

    def __call__(self, run: RunSummary) -> None:
        self.progress.update(run)
        if self._ready is not None and not run.starting:
            tell_ready(self._ready)
            self._ready = None


def newest_samples(paths: RunDir, count: int = 6) -> "list[RolloutSample]":
    """The newest rollouts of a run that are for training, of as many groups, newest first; from its log."""
    from asyncrl.replay import open as open_log  # pyarrow takes a while to import, and most runs are never asked
    from asyncrl.report.samples import DETAILS, chosen, groups_of, samples_of

    log = open_log(paths.path)
    lines = chosen(log.rollouts(["group", "purpose"]))
    newest = groups_of(lines)[: -count - 1 : -1]
    found = {sample.group: sample for sample in samples_of(log.rollouts(DETAILS, groups=newest)) if sample.purpose == "train"}
    return [found[group] for group in newest if group in found]


def _tell(result: RunResult) -> None:
    print(msgspec.json.encode(result).decode(), flush=True)


def _resume(args: argparse.Namespace) -> tuple[str, list[str], bool | int]:
    """The recipe's file, the overrides, and what to resume, as `launch` takes it.

    argparse would take any word after `--resume` for the step, so the step is the number among the words without an option.
    """
    words = [args.recipe, *args.overrides]
    steps = [int(word) for word in words if word.isdecimal()]
    file, *overrides = [word for word in words if not word.isdecimal()] or [""]
    if not file or len(steps) > args.resume:
        raise ConfigError(
            f"{' '.join(words)}: expected a recipe file and overrides a.b=c, and a number only once, after --resume: the "
            "update of the checkpoint to go on from"
        )
    return file, overrides, steps[0] if steps else args.resume


def _at_interrupt(what: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in ENDING:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, what)


def _end_in_order(number: int, frame: FrameType | None) -> None:
    """The first signal: a checkpoint, if anything is trained, then actor after actor."""
    _at_interrupt(_end_at_once)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes may send several: nobody asked twice
    _leave_closed_terminal()
    print("interrupted: ending in order; once more ends at once", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """The second signal: no checkpoint, and actors are killed. A third one does not even do that: Ray's own end has to."""
    _at_interrupt(signal.SIG_DFL)
    _leave_closed_terminal()
    print("interrupted again: ending at once", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _leave_closed_terminal() -> None:
    """What is still said goes nowhere once the terminal is closed, instead of being an error that ends the run half-way."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
