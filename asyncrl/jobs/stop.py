"""`asyncrl stop RUN`: ends a run in order, from wherever its directory is reached: as the first Ctrl-C would; or at once, as
the second one would, with --now.

Exit status 0: it has ended; 1: not within --timeout, or its leader did not answer; 2: RUN is no run.
"""

import argparse
import sys
import time
from pathlib import Path

from asyncrl.control import ANSWER_S, Stop, ask, leader
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.jobs.attach import run_dir, said_end, way_on
from asyncrl.report.followed import run_end
from asyncrl.rundir import RunDir

_LOOK_S = 0.1


def stop_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl stop`, and sets what runs."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory, runs/NAME")
    waits = "seconds to wait for its end (default 900); the run is asked to end whatever becomes of this command"
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help=waits)
    now = "at once, also if it is ending in order by now: without a checkpoint of the updates since the newest one"
    parser.add_argument("--now", action="store_true", help=now)
    parser.set_defaults(job=_stop)


def _stop(args: argparse.Namespace) -> int:
    """Standard output says how it ended, and what goes on with it."""
    if not args.timeout > 0:
        raise ConfigError(f"--timeout {args.timeout:g}: say how many seconds > 0 to wait")
    paths, deadline = run_dir(args.run), time.monotonic() + args.timeout
    if (first := leader(paths)) is not None:
        print(f"{first}: {ask(paths, Stop(args.now), min(args.timeout, ANSWER_S))}", file=sys.stderr, flush=True)
        while leader(paths) == first:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{paths.path}: {first} was asked, and has not ended within {args.timeout:g} s; it will, by --now at once"
                )
            time.sleep(_LOOK_S)
    return _told(paths)


def _told(paths: RunDir) -> int:
    end = run_end(paths)
    print(f"{paths.path} {said_end(end)}")
    if (end is None or end.status) and paths.steps():
        print(f"to go on: {way_on(paths)}")
    return 0
