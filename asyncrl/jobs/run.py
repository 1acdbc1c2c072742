"""`asyncrl run RECIPE`: the main job. Everything that can be known to fail, fails before an actor starts."""

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from asyncrl.config import Deployment, Recipe

if TYPE_CHECKING:
    from asyncrl.api import RunResult
    from asyncrl.report.summary import RunSummary
    from asyncrl.types import RunStatus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file that sets `recipe = Recipe(…)`")
    parser.add_argument("--deploy", metavar="SPEC", help="a deployment YAML file (default: this machine, as deploy/local.yaml)")
    parser.add_argument("--name", default="", help="name of the run (default: the recipe's)")
    parser.add_argument("--runs-dir", default="runs", metavar="D", help="folder of run directories (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint of this run")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="fields to change, e.g. learner.lr=1e-5")


def main(args: argparse.Namespace) -> int:
    """Runs the recipe. Standard output gets one line of JSON at the end; everything else goes to standard error."""
    from asyncrl.cluster import preflight
    from asyncrl.config.load import load_specs
    from asyncrl.config.paths import resolve_paths
    from asyncrl.rundir import resolve_run_dir

    recipe, deployment = load_specs(args.recipe, args.deploy, args.overrides)
    paths = resolve_run_dir(args.name or recipe.name, args.runs_dir)
    if args.resume:
        paths.require_checkpoint()
    recipe = resolve_paths(recipe, paths, Path(args.recipe).parent)
    plan = preflight.check(recipe, deployment, paths)
    if args.dry_run:
        print("\n".join(plan))
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # a recipe's `prepare` prints, and so does Ray
        result = _launch(recipe, deployment, args)
    print(msgspec.json.encode(result).decode(), flush=True)
    return 0


def _launch(recipe: Recipe, deployment: Deployment, args: argparse.Namespace) -> "RunResult":
    # Ray tells of every death in a paragraph of guesses; the supervisor has a line. Read when ray is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")
    from asyncrl.api import launch
    from asyncrl.models.tokenizing import tokenize_only
    from asyncrl.report.progress import Progress, Snapshot

    if not recipe.prepare:  # which may compute
        tokenize_only(recipe.model)

    began = time.monotonic()
    progress = Progress()

    def show(status: "RunStatus", tally: "RunSummary") -> None:
        snapshot = Snapshot(
            name=args.name or recipe.name,
            elapsed_s=time.monotonic() - began,
            step=tally.committed,
            total_steps=recipe.total_steps,
            samples=tally.samples,
            metrics=tally.latest,
            scores=tally.scores,
            counts=tally.counts,
            reports=status.reports,
            restarts=status.restarts,
        )
        progress.update(snapshot)

    for number in (signal.SIGINT, signal.SIGTERM):  # a job that is stopped cleans up like one that is interrupted
        signal.signal(number, _interrupt)
    try:
        return launch(recipe, deployment, name=args.name, runs_dir=args.runs_dir, resume=args.resume, observe=show)
    finally:
        progress.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first signal stops the actors in order; the second leaves them to Ray's end, which kills them."""
    print("interrupted: stopping the actors; once more stops them at once", file=sys.stderr, flush=True)
    raise KeyboardInterrupt
