"""Generators that come and go while a run goes on, 1 → 4 → 2 by `Trainer.scale`: `python tests/bench/bench_elastic.py [S]`.

Samples a second in each phase of S seconds; a run of two generators with as many updates beside it, and the mean reward of the
last ten updates of both; what the log says of rows, groups and the bound. On two Ray nodes beside the driver's; see on_nodes.py
for the engines. `--scored`: of the long-tailed task (long_tail.py), all of it, with one generator for a quarter of its updates,
four for a half and then two; and the score on held-out prompts by each evaluation. The bound is 16 there: with 4 the longest
answers take as long as five batches of one generator, and more of them help little.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from msgspec.structs import replace
from on_nodes import Led, deployment, make_recipe, say, several
from ray.cluster_utils import Cluster

from asyncrl.config.load import load_specs
from asyncrl.config.paths import resolve_paths
from asyncrl.rundir import RunDir


def reward(run_dir: str, updates: int = 10) -> float:
    """Mean over the last updates."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return fmean([line["reward/mean"] for line in lines if line["kind"] == "step"][-updates:])


def run_long_tail(cluster: Cluster, folder: Path, name: str, counts: Sequence[int]) -> tuple[Led, list[float], list[str]]:
    """The task, with so many generators for equal parts of it. How it went, samples/s of each part, what is wrong."""
    recipe, _ = load_specs(Path(__file__).with_name("long_tail.py"), None, ["staleness.max_lag=16", "evaluation.freq=200"])
    policy = replace(recipe.model, builder=f"{Path(__file__).with_name('on_nodes.py').resolve()}:waiting")
    recipe = replace(resolve_paths(recipe, RunDir(folder / name), Path(__file__).parent), model=policy)
    longest = recipe.data.max_prompt_length + recipe.sampling.max_response_length
    led, rates = Led(recipe, deployment(cluster, counts[0], slots=32, longest=longest), folder, name), []
    for number, count in enumerate(counts, start=1):
        led.trainer.scale(generators=count)
        led.until(lambda count=count: len(led.pids) == count)
        began, before = time.monotonic(), led.run.committed
        led.trainer.fit(recipe.total_steps * number // len(counts) - before)
        rates.append((led.run.committed - before) * led.per_update / (time.monotonic() - began))
    return led, rates, led.end()


def scored() -> None:
    with tempfile.TemporaryDirectory() as made, several(nodes=2) as (cluster, _):
        data = Path(made) / "elastic" / "data"  # what both begin with
        for name, counts in (("elastic", (1, 4, 4, 2)), ("fixed", (2, 2, 2, 2))):
            if data.exists():
                shutil.copytree(data, Path(made) / name / "data")
            led, rates, problems = run_long_tail(cluster, Path(made), name, counts)
            assert led.result is not None
            lines = [json.loads(line) for line in (Path(led.result.run_dir) / "metrics.jsonl").read_text().splitlines()]
            scores = [(line["step"], round(line["eval/score"], 3)) for line in lines if line["kind"] == "eval"]
            say(
                [
                    (f"{name}: samples/s with {counts} generators", ", ".join(f"{rate:.1f}" for rate in rates)),
                    ("score on held-out prompts after updates", scores),
                    ("updates, restarts, largest lag", (led.result.steps, led.result.restarts, led.result.max_trained_lag)),
                    ("rows lost, groups trained twice, bound passed", problems or "none"),
                ]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=60.0)
    parser.add_argument("--scored", action="store_true")
    args = parser.parse_args()
    if args.scored:
        scored()
    else:
        stepwise(args.seconds)


def stepwise(seconds: float) -> None:
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
