"""`asyncrl attach RUN`: watches a run that another process leads, until it ends; Ctrl-C leaves the run alone."""

import argparse
import contextlib
import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path

from asyncrl.control import leader
from asyncrl.errors import ConfigError
from asyncrl.jobs.run import newest_samples
from asyncrl.report.followed import FollowedRun, run_end
from asyncrl.report.progress import Progress
from asyncrl.report.summary import RunEnd
from asyncrl.rundir import RunDir

_LOOK_S = 0.5
_LOG_LINE = re.compile(rb"\d\d:\d\d:\d\d [A-Z]+ .*\n")


def attach_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl attach`, and sets what runs."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory, runs/NAME")
    parser.set_defaults(job=_attach)


def _attach(args: argparse.Namespace) -> int:
    """The exit status is that of the run."""
    paths = run_dir(args.run)
    who = leader(paths)
    if who is not None:
        print(f"{paths.path} is led by {who}; Ctrl-C leaves it alone", file=sys.stderr)
        try:
            _watch(paths, since=who.since)
        except KeyboardInterrupt:
            run = shlex.quote(str(args.run))
            raise KeyboardInterrupt(
                f"the run goes on; `asyncrl attach {run}` watches it, `asyncrl stop {run}` ends it"
            ) from None
    end = run_end(paths)
    print(f"{paths.path} {said_end(end)}", file=sys.stderr)
    return 1 if end is None else end.status


def run_dir(path: Path) -> RunDir:
    """Of a run that has begun, or is about to. Raises ConfigError."""
    paths = RunDir(path.expanduser().resolve())
    if not paths.recipe.exists() and leader(paths) is None:
        raise ConfigError(f"{path} is no run directory: it holds no {paths.recipe.name}; name the folder of a run, runs/NAME")
    return paths


def said_end(end: RunEnd | None) -> str:
    """How a run ended that nobody leads, in words."""
    if end is None:
        return "is led by nobody, and nobody said how it ended: whatever led it was killed"
    saved = f"; the newest checkpoint is {end.checkpoint}" if end.checkpoint else ""
    if end.status == 0:
        return f"is done, after {end.steps} updates{saved}"
    if end.status == 130:
        return f"was stopped after {end.steps} updates{saved}"
    return f"failed after {end.steps} updates{saved}\nerror: {end.error}"


def way_on(paths: RunDir) -> str:
    """The command that goes on with a run."""
    words = ["asyncrl", "run", str(paths.recipe), "--deploy", str(paths.deployment), "--name", paths.path.name]
    return shlex.join([*words, "--runs-dir", str(paths.path.parent), "--resume"])


def _watch(paths: RunDir, since: float) -> None:
    """Shows the run until nobody leads it: its figures, and above them the log of a detached one."""
    run = FollowedRun(paths, since)
    logged = paths.driver_log.stat().st_size if paths.driver_log.exists() else 0
    with contextlib.closing(Progress(partial(newest_samples, paths))) as progress:
        going = True
        while going:
            going = leader(paths) is not None  # first: what it wrote before it ended is then read
            logged = _show_log(paths.driver_log, logged)
            progress.update(run.read())
            time.sleep(_LOOK_S if going else 0)


def _show_log(path: Path, shown: int) -> int:
    """Writes what is new in a log to standard error, without the progress that stands there too; returns where it ends."""
    if not path.exists():
        return shown
    with path.open("rb") as file:
        file.seek(shown)
        new, end, _ = file.read().rpartition(b"\n")
    for line in _LOG_LINE.findall(new + end):
        sys.stderr.write(line.decode(errors="replace"))
    return shown + len(new + end)
