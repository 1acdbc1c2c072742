"""`asyncrl clean`: lists what dead runs left on this machine, and removes it; never what a living one uses."""

import argparse

from asyncrl.disk import as_size
from asyncrl.scratch import remove, traces


def clean_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl clean`, and sets what runs."""
    parser.add_argument("--yes", action="store_true", help="remove the leftovers, instead of only listing them")
    parser.set_defaults(job=_clean)


def _clean(args: argparse.Namespace) -> int:
    """Exit status 1 if something could not be removed."""
    found = traces()
    left = [trace for trace in found if not trace.in_use]
    kept = [trace for trace in left if args.yes and not remove(trace)]
    for trace in found:
        state = "in use" if trace.in_use or trace in kept else "removed" if args.yes else "left"
        print(f"{state:<8} {as_size(trace.size_bytes):>10}  {trace.what:<23} {trace.path}")
    size = as_size(sum(trace.size_bytes for trace in left))
    said = f"{len(left)} left by dead runs, {size}; {len(found) - len(left)} in use by living ones"
    if left:
        said += f"; {len(left) - len(kept)} removed" if args.yes else "; `asyncrl clean --yes` removes what is left"
    print(said)
    return 1 if kept else 0
