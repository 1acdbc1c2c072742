"""`asyncrl run RECIPE`: the main job. Everything that can be known to fail, fails before an actor starts."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import msgspec

from asyncrl.api import launch
from asyncrl.cluster.preflight import check_run
from asyncrl.config.load import load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import ConfigError
from asyncrl.models.tokenizing import tokenize_only
from asyncrl.report.progress import Progress
from asyncrl.rundir import resolve_run_dir


def run_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl run`, and sets what runs."""
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file that sets `recipe = Recipe(…)`")
    parser.add_argument("--deploy", metavar="SPEC", help="a deployment YAML file (default: this machine, as deploy/local.yaml)")
    parser.add_argument("--name", default="", help="name of the run (default: the recipe's)")
    parser.add_argument("--runs-dir", default="runs", metavar="D", help="folder of run directories (default: runs)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from this run's newest checkpoint that is whole and in its log; `--resume 150`: from that of update 150",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="fields to change, e.g. learner.lr=1e-5")
    parser.set_defaults(job=_run)


def _run(args: argparse.Namespace) -> int:
    """Runs the recipe. Standard output gets one line of JSON at the end; everything else goes to standard error."""
    file, overrides, resume = _resume(args)
    recipe, deployment = load_specs(file, args.deploy, overrides)
    paths = resolve_run_dir(args.name or recipe.name, args.runs_dir)
    recipe = resolve_paths(recipe, paths, Path(file).parent)
    if args.dry_run:
        if resume is not False:
            paths.require_checkpoint(None if resume is True else resume)
        print("\n".join(check_run(recipe, deployment, paths)))
        return 0

    # Ray tells of every death in a paragraph of guesses; the supervisor has a line. Read when ray is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")
    _at_interrupt(_end_in_order)
    if not recipe.prepare:  # which may compute
        tokenize_only(recipe.model)
    try:
        # A recipe's `prepare` prints, and so does Ray.
        with contextlib.redirect_stdout(sys.stderr), contextlib.closing(Progress()) as progress:
            result = launch(
                recipe,
                deployment,
                name=args.name,
                runs_dir=args.runs_dir,
                resume=resume,
                observe=progress.update,
                progress=False,
            )
    finally:
        _at_interrupt(signal.SIG_DFL)  # nothing is left to be ended in order
    print(msgspec.json.encode(result).decode(), flush=True)
    return 0


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
    for number in (signal.SIGINT, signal.SIGTERM):  # a job that is stopped ends like one that is interrupted
        signal.signal(number, what)


def _end_in_order(number: int, frame: FrameType | None) -> None:
    """The first signal: a checkpoint, if anything is trained, then actor after actor."""
    _at_interrupt(_end_at_once)
    print("interrupted: ending in order; once more ends at once", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """The second signal: no checkpoint, and actors are killed. A third one does not even do that: Ray's own end has to."""
    _at_interrupt(signal.SIG_DFL)
    print("interrupted again: ending at once", file=sys.stderr, flush=True)
    raise KeyboardInterrupt
