"""Simulated against real runs: `python tests/bench/bench_simulate.py RUN… [--from RUN]`. Prints real / simulated.

Each run is simulated with its recipe and deployment, and with its own costs or those of the run that --from names. They
should be runs without evaluations, which are not simulated:

    asyncrl run tests/bench/long_tail.py "evaluation.files=[]" total_steps=150 staleness.max_lag=4 --name tail-4
    python tests/bench/bench_simulate.py runs/tail-4
"""

import argparse
from pathlib import Path

import msgspec

from asyncrl.config import Recipe
from asyncrl.config.load import load_deployment
from asyncrl.simulate.measured import measure
from asyncrl.simulate.simulation import simulate


def real(run: Path, generators: int) -> dict[str, float]:
    """The same figures as a simulation has, of the updates after the first fifth."""
    lines = [msgspec.json.decode(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    since, until = steps[len(steps) // 5]["time"], steps[-1]["time"]
    steps = steps[len(steps) // 5 + 1 :]
    first, *_, last = [line for line in lines if line["kind"] == "actors" and since <= line["time"] <= until]

    def idle(actor: str) -> float:
        states = {name: value - first.get(name, 0.0) for name, value in last.items() if name.startswith(f"{actor}/")}
        waited = sum(seconds for name, seconds in states.items() if "/wait:" in name)
        return waited / (waited + states[f"{actor}/busy_s"] + states.get(f"{actor}/sync_s", 0.0))

    tokens = sum(line["tokens/trained"] for line in steps)
    return {
        "samples/s": sum(line["samples"] for line in steps) / (until - since),
        "learner idle": idle("learner"),
        "generators idle": sum(idle(f"generator-{i}") for i in range(generators)) / generators,
        "rewards idle": idle("reward-0"),
        "lag": sum(line["staleness/lag_mean"] * line["tokens/trained"] for line in steps) / tokens,
        "worst lag": max(line["staleness/lag_max"] for line in steps),
        "masked": 1 - tokens / sum(line["tokens/policy"] for line in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--from", dest="source", type=Path)
    options = parser.parse_args()
    for run in options.runs:
        costs, lengths, _ = measure(str(options.source or run))
        recipe = msgspec.json.decode((run / "recipe.json").read_bytes(), type=Recipe)
        deployment = load_deployment(run / "deployment.yaml")
        found = real(run, deployment.generators.count)
        guess = simulate(recipe, deployment, costs, lengths, recipe.total_steps)
        shown = [f"{name} {found[name]:.3g} / {guess[name]:.3g}" for name in found]
        print(f"{run.name:12} {guess['samples/s'] / found['samples/s'] - 1:+.1%}  {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
