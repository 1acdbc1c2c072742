"""`asyncrl replay RUN`: trains again what a run trained, from its log, and compares to the bit. No generator, no rewards."""

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from asyncrl.cluster.fit import device_memory, fit_layouts
from asyncrl.config import Deployment, Recipe
from asyncrl.config.load import load_deployment
from asyncrl.errors import ConfigError
from asyncrl.jobs.local_ranks import LocalRanks, join_at, together
from asyncrl.learn.past import choose_updates, own_checkpoints, said_made_on
from asyncrl.learn.policies import run_recipe
from asyncrl.processes import end_with_owner
from asyncrl.replay.log.history import RunHistory, open_history
from asyncrl.rundir import RunDir, StandardError, set_up_logging

if TYPE_CHECKING:
    from asyncrl.learn.retraining import PastRun
    from asyncrl.models.ranks import Ranks

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0
_PLAN = "replay.json"


class Replay(Struct, frozen=True, kw_only=True):
    """What is to be trained again, for every rank."""

    run: str
    begin: int  # update of the checkpoint that it goes on from
    end: int
    local: LocalRanks


class Replayed(Struct, kw_only=True):
    """What came of it: the line on standard output."""

    run: str
    begin: int
    end: int  # the last update that was made
    ranks: int
    threads: int
    equal: bool = True
    metrics: int = 0  # compared
    checkpoints: list[int] = []  # compared
    first_metric: dict[str, Any] | None = None  # the first that differs
    first_weights: dict[str, Any] | None = None  # the tensor that differs most, of the first checkpoint that differs
    seconds: float = 0.0
    run_seconds: float = 0.0  # that the run took for the same updates


def replay_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl replay`, and sets what runs."""
    parser.add_argument("run", metavar="RUN", help="a run directory, runs/NAME; nothing in it is changed")
    begin = (
        "checkpoint to go on from; 0 without one: the model that the run began with (default: the oldest whose rows are there)"
    )
    parser.add_argument("--from", dest="begin", type=int, metavar="STEP", help=begin)
    parser.add_argument("--to", dest="end", type=int, metavar="STEP", help="last update to make (default: the newest)")
    parser.set_defaults(job=_replay)


def _replay(args: argparse.Namespace) -> int:
    """Exit status 0: everything is equal; 1: something differs."""
    run, recipe, deployment = run_and_specs(args.run)
    history = open_history(run.path)
    begin, end = choose_updates(run, history, args.begin, args.end)
    local = local_ranks(run, history, begin, recipe, deployment)
    os.environ["OMP_NUM_THREADS"] = str(local.threads)  # read when torch is first imported
    plan = Replay(run=str(run.path.absolute()), begin=begin, end=end, local=local)
    print(f"updates {begin + 1} to {end}, from the checkpoint of {begin}: loading", file=sys.stderr)
    with working_folder() as work:
        (work.path / _PLAN).write_bytes(msgspec.json.encode(plan))
        with together(local, work, __name__) as ranks:
            found = _train(plan, history, work, ranks)
    print(msgspec.json.encode(found).decode())
    return 0 if found.equal else 1


def run_and_specs(path: str) -> tuple[RunDir, Recipe, Deployment]:
    """A run's directory and specs. Raises ConfigError for a folder that is none."""
    run = RunDir(Path(path).expanduser())
    if (recipe := run_recipe(run.recipe)) is None:
        raise ConfigError(f"{path} is no run directory: it holds no {run.recipe.name}; name the folder of a run, runs/NAME")
    return run, recipe, load_deployment(run.deployment)


def local_ranks(run: RunDir, history: RunHistory, begin: int, recipe: Recipe, deployment: Deployment) -> LocalRanks:
    """Those that trained the updates after `begin`, on this machine: as the next checkpoint has it, or else the deployment.
    Raises ConfigError where they don't fit here."""
    device = "cuda" if deployment.learner.place.gpus else "cpu"
    checkpoints = own_checkpoints(run, history)
    if checkpoints:
        nearest = min((update for update in checkpoints if update > begin), default=checkpoints[-1])
        if said := said_made_on(run.checkpoint(nearest)):
            return msgspec.convert(said | {"device": device}, LocalRanks)
    devices = {group: [device_memory(of.place)] * of.ranks for group, of in deployment.groups.items()}
    layouts = {group: fit.layout for group, fit in fit_layouts(recipe, deployment, devices).items()}
    return LocalRanks(layouts=layouts, device=device, threads=deployment.learner.place.threads)


@contextlib.contextmanager
def working_folder() -> Iterator[RunDir]:
    """A folder for what the ranks say, and for batches of refused steps: after an error it stays, if it holds any."""
    work, failed = RunDir(tempfile.mkdtemp(prefix="asyncrl-")), True
    try:
        yield work
        failed = False
    finally:
        if not (failed and {file.name for file in work.path.iterdir()} - {_PLAN}):
            shutil.rmtree(work.path, ignore_errors=True)


def past_run(run: RunDir, recipe: Recipe, history: RunHistory, local: LocalRanks, work: RunDir, ranks: "Ranks") -> "PastRun":
    """The run's training as this rank has it, with the weights that the run began with."""
    import torch

    from asyncrl.learn.build import policy_trainer
    from asyncrl.learn.retraining import PastRun
    from asyncrl.models.loading import use_threads

    if local.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{run.path} was trained on GPUs, and there is none here: go back on a machine like that of the run")
    use_threads(local.threads)
    trainer = policy_trainer(recipe, device=local.device, refused_dir=work.path / "refused", ranks=ranks)
    return PastRun(run, history, trainer, ranks)


def _train(plan: Replay, history: RunHistory, work: RunDir, ranks: "Ranks") -> Replayed:
    """Makes the updates until the last one, or the first checkpoint after something differed."""
    run, recipe, _ = run_and_specs(plan.run)
    past = past_run(run, recipe, history, plan.local, work, ranks)
    past.load(plan.begin)
    found = Replayed(run=plan.run, begin=plan.begin, end=plan.begin, ranks=ranks.count, threads=plan.local.threads)
    saved, told, began = set(own_checkpoints(run, history)), time.monotonic(), time.monotonic()
    while past.committed < plan.end:
        metrics = past.step(past.batch())
        found.end = past.committed
        found.run_seconds += history.commits[past.committed].metrics.get("timing_s/step", 0.0)
        _compare_metrics(past, metrics, found)
        kept = past.committed in saved and run.checkpoint(past.committed).is_dir()  # a run that goes on deletes some
        at_checkpoint = ranks.lead_text(str(kept)) == "True"
        if at_checkpoint:
            _compare_weights(past, found)
        found.seconds = time.monotonic() - began
        if ranks.first and (at_checkpoint or time.monotonic() - told >= LINE_EVERY_S):
            told = time.monotonic()
            _tell(found, plan.end)
        # All ranks have the same metrics; what differs in weights, only the first one knows.
        if at_checkpoint and ranks.lead_text(str(found.equal)) == "False":
            break
    return found


def _compare_metrics(past: "PastRun", metrics: Mapping[str, float], found: Replayed) -> None:
    unlike, compared = past.unlike_metrics(metrics)
    found.metrics += compared
    if unlike:
        found.equal = False
        if found.first_metric is None:
            found.first_metric = unlike[0]._asdict()
            log.warning("differs: %s", "; ".join(f"update {u}: {m} {was!r}, now {now!r}" for u, m, was, now in unlike))


def _compare_weights(past: "PastRun", found: Replayed) -> None:
    found.checkpoints.append(past.committed)
    if unlike := past.unlike_weights():
        found.equal = False
        name, largest = max(unlike, key=lambda of: of.largest)
        found.first_weights = {
            "checkpoint": past.committed,
            "tensor": name,
            "max_abs_difference": largest,
            "tensors": len(unlike),
        }
        log.warning("checkpoint %d differs: %s", past.committed, json.dumps(found.first_weights))


def _tell(found: Replayed, end: int) -> None:
    so_far = "equal to the bit" if found.equal else "different"
    at = f", checkpoints {', '.join(map(str, found.checkpoints))}" if found.checkpoints else ""
    paces = f"{found.seconds:.1f} s (the run: {found.run_seconds:.1f} s)"
    print(f"update {found.end}/{end}: {found.metrics} metrics{at}: {so_far}; {paces}", file=sys.stderr)


if __name__ == "__main__":  # a rank that `together` started
    _, folder, rank, port, lifeline = sys.argv
    end_with_owner(int(lifeline))
    set_up_logging(StandardError())
    work = RunDir(folder)
    plan = msgspec.json.decode((work.path / _PLAN).read_bytes(), type=Replay)
    _train(plan, open_history(plan.run), work, join_at(int(port), plan.local, int(rank)))
    os._exit(0)  # the first rank may have left the group already: nothing here needs it any more
