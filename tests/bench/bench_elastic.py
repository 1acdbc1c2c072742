"""Generators that come and go while a run goes on, 1 → 4 → 2 by `Trainer.scale`: `python tests/bench/bench_elastic.py [S]`.

Samples a second in each phase of S seconds; a run of two generators with as many updates beside it, and the mean reward of the
last ten updates of both; what the log says of rows, groups and the bound. On two Ray nodes beside the driver's; see on_nodes.py
for the engines.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

from on_nodes import Led, deployment, make_recipe, say, several


def reward(run_dir: str, updates: int = 10) -> float:
    """Mean over the last updates."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return fmean([line["reward/mean"] for line in lines if line["kind"] == "step"][-updates:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as made, several(nodes=2) as (cluster, _):
        folder = Path(made)
        recipe = make_recipe(folder)
        led = Led(recipe, deployment(cluster, 1), folder, "elastic")
        rows: list[tuple[str, object]] = []
        for count in (1, 4, 2):
            led.trainer.scale(generators=count)
            led.until(lambda count=count: len(led.pids) == count)
            rows.append((f"{count} generators: samples/s", f"{led.measure(seconds):.1f}"))
        problems = led.end()
        fixed = Led(recipe, deployment(cluster, 2), folder, "fixed")
        fixed.trainer.fit(led.result.steps)
        fixed_problems = fixed.end()
        rows += [
            ("updates", led.result.steps),
            ("restarts, preemptions", f"{led.result.restarts}, {led.result.preemptions}"),
            ("largest lag", led.result.max_trained_lag),
            ("reward of the last ten updates", f"{reward(led.result.run_dir):.3f}, fixed {reward(fixed.result.run_dir):.3f}"),
            ("rows lost, groups trained twice, bound passed", [*problems, *fixed_problems] or "none"),
        ]
        say(rows)


if __name__ == "__main__":
    main()
