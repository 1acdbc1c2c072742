"""`asyncrl simulate RECIPE`: how fast a recipe would run on which machines, how stale, and who would wait."""

import argparse
import itertools
import re
import sys

from msgspec.structs import asdict

from asyncrl.config.load import load_specs, override
from asyncrl.errors import ConfigError
from asyncrl.rundir import RunDir
from asyncrl.simulate.costs import Costs
from asyncrl.simulate.elastic import Trace, random_trace, read_trace
from asyncrl.simulate.measured import measure
from asyncrl.simulate.simulation import simulate

_COMMA, _COLON = (re.compile(rf"{mark}(?![^{{]*}})") for mark in ",:")  # not those of `{min: 1, max: 4}`
_EQUAL = 0.98  # so much of the most trained tokens/s is as good, and the least stale of these is the best


def simulate_job(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `asyncrl simulate`, and sets what runs."""
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file that sets `recipe = Recipe(…)`")
    parser.add_argument("--deploy", metavar="SPEC", help="a deployment YAML file (default: that of --from, else this machine)")
    parser.add_argument("--from", dest="run", metavar="RUN", help="a run directory: costs and lengths are measured there")
    tried = "values to try; fields joined by `:` change together; repeatable, for all combinations"
    parser.add_argument("--try", dest="tried", action="append", default=[], metavar="FIELD=A,B,…[:FIELD=…]", help=tried)
    parser.add_argument("--updates", type=int, default=100, help="to simulate of each; the first fifth is not counted (100)")
    spot = (
        "nodes that come and go: each is taken after LIFE seconds on average, and back after AWAY; or a file of SECONDS NODES"
    )
    parser.add_argument("--spot", metavar="LIFE/AWAY|FILE", help=spot)
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="fields to change, and costs.NAME=VALUE")
    parser.set_defaults(job=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    """Prints a line for each setting as soon as it is known, and the best at the end."""
    if args.updates < 10:
        raise ConfigError(f"--updates {args.updates} < 10: there would be nothing but the start; simulate at least 10")
    costs, lengths, source = measure(args.run) if args.run else (Costs(), None, "assumed where they are not stated")
    deploy = args.deploy or (RunDir(args.run).deployment if args.run else None)
    settings = [sum(setting, ()) for setting in itertools.product(*map(_choices, args.tried))]
    found: list[tuple[dict[str, float], str]] = []
    for setting in settings:
        stated = [text for text in (*args.overrides, *setting) if text.startswith("costs.")]
        others = [text for text in (*args.overrides, *setting) if not text.startswith("costs.")]
        try:
            recipe, deployment = load_specs(args.recipe, deploy, others)
            paid = override(costs, stated, "costs.")
            drawn = lengths or paid.lengths(recipe.rollouts_per_group, recipe.sampling.max_response_length)
            trace = args.spot and _trace(args.spot, deployment.generators.most, recipe.seed)
            figures = simulate(recipe, deployment, paid, drawn, args.updates, trace)
        except ConfigError as error:
            if len(settings) == 1:
                raise
            print(f"{' '.join(setting)}: {error}", file=sys.stderr)
            continue
        if not found:
            tokens = list(itertools.chain(*drawn))
            print(f"costs, {source}: {', '.join(f'{name}={value:.3g}' for name, value in asdict(paid).items())}")
            print(f"responses: {min(tokens)} to {max(tokens)} tokens, {sum(tokens) / len(tokens):.4g} on average")
            print("not simulated: evaluations, deaths, what actors on the same cores take from each other in other settings\n")
            print("  ".join([*figures, "setting"]))
        found.append((figures, " ".join(setting) or "as it is"))
        print("  ".join([*(f"{value:{len(name)}.3g}" for name, value in figures.items()), found[-1][1]]), flush=True)
    if not found:
        raise ConfigError("none of what was tried can be run, for the reasons above")
    most = max(figures["trained tokens/s"] for figures, _ in found)
    best = min((figures["lag"], name) for figures, name in found if figures["trained tokens/s"] >= _EQUAL * most)[1]
    print(f"best: {best} (the least stale of those within {1 - _EQUAL:.0%} of the most trained tokens/s)")
    return 0


def _trace(spot: str, nodes: int, seed: int) -> Trace:
    if (stated := re.fullmatch(r"([0-9.e]+)/([0-9.e]+)", spot)) is None:
        return read_trace(spot)
    life_s, away_s = float(stated[1]), float(stated[2])
    if not (life_s > 0 and away_s > 0):
        raise ConfigError(f"--spot {spot}: a node stays, and is away, for some time; use seconds > 0")
    return random_trace(nodes, life_s, away_s, seed)


def _choices(tried: str) -> list[tuple[str, ...]]:
    """The overrides that change together, for each of the values."""
    fields = [(field, _COMMA.split(values)) for field, _, values in (part.partition("=") for part in _COLON.split(tried))]
    if not all(values[0] and len(values) == len(fields[0][1]) for _, values in fields):
        example = "staleness.max_lag=0,4 or deploy.generators.count=6,4:deploy.learner.ranks=2,4"
        raise ConfigError(f"--try {tried!r}: expected FIELD=A,B,…, with as many values for each field; for example {example}")
    return list(zip(*([f"{field}={value}" for value in values] for field, values in fields), strict=True))
