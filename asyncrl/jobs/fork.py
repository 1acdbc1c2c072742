"""`asyncrl fork RUN --at STEP NAME a.b=c …`: a new run from a checkpoint of another one, and from the batches of its log.

RUN is only read, also while it goes on."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import yaml
from msgspec import Struct
from msgspec.structs import replace

import asyncrl.replay.log.events as ev
from asyncrl.cluster.preflight import check_resumed, check_run
from asyncrl.cluster.preparation import require_same_groups
from asyncrl.config import Deployment, Recipe
from asyncrl.config.load import load_deployment, load_recipe, override
from asyncrl.config.paths import PLACEHOLDER, resolve_paths
from asyncrl.errors import ConfigError
from asyncrl.jobs.run import run_shown
from asyncrl.learn.policies import newest_complete
from asyncrl.manifests import verify_manifest
from asyncrl.replay.log.derived import LogChanges, OldLog
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.report.paired import paired_lines
from asyncrl.rundir import RunDir, atomic_folder, link_or_copy, redact, resolve_run_dir, write_atomic

MIN_ESS = 0.5  # the weights' variance is as large as their mean squared: where particle filters start afresh


def fork_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl fork`, and sets what runs."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory, of a run that goes on or has ended")
    parser.add_argument("name", metavar="NAME", help="of the new run")
    parser.add_argument("--at", type=int, required=True, metavar="STEP", help="the checkpoint to start from, in updates")
    parser.add_argument("--live", action="store_true", help="use no batch of the log: generate from the first update on")
    add_fork_arguments(parser)
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="fields to change, e.g. learner.lr=1e-5")
    parser.set_defaults(job=_fork)


def add_fork_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that everything has that makes one run of another."""
    parser.add_argument(
        "--min-ess",
        type=float,
        metavar="X",
        help=f"the log is left when a batch of it has a gap/ess below this (default {MIN_ESS}; 0 where nothing is changed)",
    )
    parser.add_argument("--runs-dir", metavar="D", help="folder of the new run (default: that of RUN)")
    parser.add_argument("--deploy", metavar="SPEC", help="a deployment YAML file (default: that of RUN)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, make nothing")


def least_ess(args: argparse.Namespace, otherwise: float) -> float:
    """What --min-ess says. Raises ConfigError."""
    if args.min_ess is None:
        return otherwise
    if not 0 <= args.min_ess <= 1:
        raise ConfigError(f"--min-ess {args.min_ess:g} is no share of a batch's tokens; use 0 (never leave the log) to 1")
    return float(args.min_ess)


class Fork(Struct, frozen=True, kw_only=True):
    """A run that is to be made of another one."""

    source: RunDir
    paths: RunDir  # its own
    at: int  # updates of the checkpoint that it starts from
    recipe: Recipe  # its files are the source's
    deployment: Deployment
    log: OldLog
    changes: LogChanges
    changed: Sequence[str]  # what is not as in the source, for people

    @property
    def words(self) -> list[str]:
        """What to write after `asyncrl` to go on with it."""
        own = self.paths
        return ["run", str(own.recipe), "--deploy", str(own.deployment), "--runs-dir", str(own.path.parent), "--resume"]

    def plan(self) -> list[str]:
        """Lines for people, once all is checked that can be known to fail. Raises ConfigError."""
        batches = [] if self.changes.live else self.log.derivation.batches
        until = f"until gap/ess < {self.changes.min_ess:g}" if self.changes.min_ess else "whatever comes of it"
        log = f"{len(batches)} batches of {sum(map(len, batches))} groups, {until}; then live" if batches else "no batch; live"
        told = {"fork": f"{self.source.path} at update {self.at}", "changed": ", ".join(self.changed) or "nothing", "log": log}
        return [
            *check_run(self.recipe, self.deployment, self.paths),
            *(f"{name:<11} {text}" for name, text in told.items()),
        ]

    def make(self) -> Recipe:
        """Writes the new run directory, whole or not at all, and returns the recipe that runs in it."""
        source, own = self.source, self.paths
        recipe = resolve_paths(moved(self.recipe, source), own)
        copied = [folder for folder in (source.data, source.functions) if folder.is_dir()]
        size = sum(file.stat().st_size for folder in copied for file in folder.rglob("*") if file.is_file())
        with atomic_folder(own.path, size) as folder:
            beside = RunDir(folder).create()
            for of in copied:  # not linked: what `prepare` makes may be written in place
                shutil.copytree(of, folder / of.name, dirs_exist_ok=True)
            checkpoint = source.checkpoint(self.at)
            shutil.copytree(checkpoint, beside.checkpoint(self.at), copy_function=link_or_copy)
            shutil.rmtree(beside.replay)
            self.log.write(beside.replay, str(source.path), self.changes)
            write_atomic(beside.recipe, msgspec.json.format(msgspec.json.encode(redact(recipe)), indent=2))
            write_atomic(beside.deployment, yaml.safe_dump(redact(self.deployment), sort_keys=False))
            facts = {"source": str(source.path), "update": self.at, "changed": list(self.changed)}
            facts |= {"min_ess": self.changes.min_ess, "batches": 0 if self.changes.live else len(self.log.derivation.batches)}
            write_atomic(beside.forked, msgspec.json.format(msgspec.json.encode(facts), indent=2))
            if (started := source.path / ".started").exists():  # so that no actor's incarnation comes again
                shutil.copyfile(started, folder / started.name)
            verify_manifest(beside.checkpoint(self.at), sums=False)  # a run that goes on may have deleted it meanwhile
            _require_free(own)
        return recipe

    def run(self) -> None:
        """Makes it, and runs it to its end as `asyncrl run` does."""
        recipe = self.make()
        print(f"made {self.paths.path}; to go on with it: {shlex.join(['asyncrl', *self.words])}", file=sys.stderr)
        run_shown(recipe, self.deployment, self.paths, self.at, self.words)
        print("\n".join(paired_lines(metrics_after(self.source, self.at), metrics_after(self.paths, self.at))), file=sys.stderr)


def metrics_after(run: RunDir, at: int) -> dict[int, dict[str, float]]:
    """What a run's log says of each update after `at`, evaluations included, as far as it survived."""
    found: dict[int, dict[str, float]] = {}
    for event in ReplayReader(run.replay).decoded(ev.BatchCommitted, ev.Evaluated, ev.LearnerFenced):
        if isinstance(event, ev.LearnerFenced):
            found = {update: metrics for update, metrics in found.items() if update <= event.committed}
        elif isinstance(event, ev.BatchCommitted):
            found[event.version.update] = dict(event.metrics)
        elif isinstance(event, ev.Evaluated) and (version := event.result.version).update in found:
            found[version.update]["eval/score"] = event.result.score
    return {update: metrics for update, metrics in found.items() if update > at}


def moved(recipe: Recipe, source: RunDir) -> Recipe:
    """The same recipe with `{run}` in the place of the source's directory."""
    inside = msgspec.json.encode(f"{source.path}/")[1:-1]
    return msgspec.json.decode(msgspec.json.encode(recipe).replace(inside, f"{PLACEHOLDER}/".encode()), type=Recipe)


def source_of(run: Path) -> RunDir:
    """A run directory to be read. Raises ConfigError if it is none."""
    source = RunDir(run.expanduser().resolve())
    for needed in (source.recipe, source.deployment, source.replay):
        if not needed.exists():
            raise ConfigError(f"{run} is no run directory: it has no {needed.name}; name one, as runs/arithmetic")
    return source


def new_paths(source: RunDir, name: str, runs_dir: str | None) -> RunDir:
    """Where the new run is to be. Raises ConfigError if something is there already."""
    paths = resolve_run_dir(name, runs_dir or source.path.parent)
    _require_free(paths)
    return paths


def _require_free(paths: RunDir) -> None:
    if paths.path.exists():
        raise ConfigError(f"{paths.path} is there already, and would be lost: choose another NAME, or another --runs-dir")


def old_log(source: RunDir, recipe: Recipe, at: int, *, end: int | None = None, live: bool = False) -> OldLog:
    """The log seen from a checkpoint that can be gone on from with this recipe. end: of its events, if not of all. live: none
    of its batches is needed. Raises ConfigError, CheckpointError or DataError, which list what there is."""
    require_same_groups(source, recipe, forking=True)
    if at not in (there := [source.update_of(step) for step in source.steps()]):
        known = ", ".join(map(str, there)) or "none yet"
        raise ConfigError(f"--at {at}: {source.path} has no checkpoint of that update to fork from; it has {known}")
    if recipe.total_steps <= at:
        raise ConfigError(f"total_steps={recipe.total_steps} <= --at {at}: the new run would make no update; raise it")
    log = OldLog(source.replay, at, end)
    newest_complete(source, at, log.derivation.lineage.refusal, sums=False)
    check_resumed(recipe, source, at)
    if not live:
        log.require_rows(there)
    return log


def _fork(args: argparse.Namespace) -> int:
    """Standard output gets the plan of a dry run, or one line of JSON at the end."""
    source = source_of(args.run)
    paths = new_paths(source, args.name, args.runs_dir)
    deploy = [text for text in args.overrides if text.startswith("deploy.")]
    own = [text for text in args.overrides if not text.startswith("deploy.")]
    base = load_recipe(source.recipe)
    base = replace(base, algorithm=base.algorithm.unresolved)  # another loss brings its own settings
    recipe = resolve_paths(replace(override(base, own), name=args.name), source)
    min_ess = least_ess(args, MIN_ESS if own else 0.0)
    fork = Fork(
        source=source,
        paths=paths,
        at=args.at,
        recipe=recipe,
        deployment=load_deployment(args.deploy or source.deployment, deploy),
        log=old_log(source, recipe, args.at, live=args.live),
        changes=LogChanges(min_ess=min_ess, live=args.live),
        changed=args.overrides,
    )
    plan = fork.plan()
    if args.dry_run:
        print("\n".join(plan))
    else:
        fork.run()
    return 0
