"""`asyncrl scale RUN generators=4 rewards=2 learner=2`: how many there should be from now on, of a run that goes on."""

import argparse
from pathlib import Path

from asyncrl.control import Scale, ask
from asyncrl.errors import ConfigError
from asyncrl.jobs.attach import run_dir


def scale_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl scale`, and sets what runs."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory, runs/NAME")
    counts = "generators=N, rewards=N, learner=N: actors, or ranks, that should be there; what is not named stays as it is"
    parser.add_argument("counts", nargs="+", metavar="ROLE=N", help=counts)
    parser.set_defaults(job=_scale)


def _scale(args: argparse.Namespace) -> int:
    """Returns when the run has taken it; the actors come and go after that, as `asyncrl status` tells."""
    request = asked_counts(args.counts)
    print(ask(run_dir(args.run), request))
    return 0


def asked_counts(words: list[str]) -> Scale:
    """Raises ConfigError for what is no count of actors that may change."""
    counts: dict[str, int] = {}
    for word in words:
        role, _, count = word.partition("=")
        if role not in Scale.__struct_fields__ or not count.isdecimal() or role in counts:
            known = ", ".join(f"{name}=N" for name in Scale.__struct_fields__)
            raise ConfigError(
                f"{word!r}: expected each of {known} at most once, with N the number of actors that should be there"
            )
        counts[role] = int(count)
    return Scale(**counts)
