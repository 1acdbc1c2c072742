"""What staleness costs: `python tests/bench/staleness.py [--seeds 3] [--runs-dir runs/staleness] [--plot staleness.svg]`.

1. recipes/arithmetic.py with max_lag 0, 1, 4, 8 and the default correction (decoupled PPO), and 4 and 8 without any: final
   held-out score, and how stale the trained tokens really were.
2. long_tail.py, answers of long-tailed length: on_stale `hold` with its defaults beside `wait`, `mask` and `drop` at max_lag 4.

Prints both tables, mean [least, most] over the seeds. The plot wants matplotlib: `pip install -e '.[bench]'`. Some 25 runs
of a minute. Runs that are finished are not run again.
"""

import argparse
from pathlib import Path

from runs import RECIPES, Finished, Settings, run, spread, table

ARITHMETIC, LONG_TAIL = RECIPES / "arithmetic.py", Path(__file__).with_name("long_tail.py")
UNCORRECTED = ("algorithm.correction=none",)
LAGS = [
    *(Settings(f"lag {lag}", ARITHMETIC, (f"staleness.max_lag={lag}",)) for lag in (0, 1, 4, 8)),
    *(Settings(f"lag {lag} uncorrected", ARITHMETIC, (f"staleness.max_lag={lag}", *UNCORRECTED)) for lag in (4, 8)),
]
RULES = [
    Settings("hold", LONG_TAIL),
    *(
        Settings(f"{rule}, max_lag 4", LONG_TAIL, (f"staleness.on_stale={rule}", "staleness.max_lag=4"))
        for rule in ("wait", "mask", "drop")
    ),
]
RULE_COLUMNS = ("on_stale", "final score", "on long answers", "wall clock, s", "learner busy", "masked tokens", "of long heads")
RULE_COLUMNS += (
    "evicted groups",
    "trained / dispatched length",
    "mean lag",
    "worst lag",
    "limited by: reserve",
    "bound",
    "stragglers",
)


def last_scores(finished: list[Finished]) -> list[float]:
    return [run.result.last_score or 0.0 for run in finished]


def lag_row(settings: Settings, finished: list[Finished]) -> list[str]:
    return [
        settings.label,
        spread(last_scores(finished)),
        spread((run.mean("staleness/lag_mean") for run in finished), 1),
        spread(run.mean("correction/ess") for run in finished),
        spread((run.result.wall_s for run in finished), 0),
    ]


def rule_row(settings: Settings, finished: list[Finished]) -> list[str]:
    results = [run.result for run in finished]
    return [
        settings.label,
        spread(last_scores(finished)),
        spread(run.evals[-1]["eval/score/long"] for run in finished),
        spread((result.wall_s for result in results), 0),
        spread((result.learner_utilization for result in results), 2),
        spread((result.masked_share for result in results), 2),
        spread((result.masked_head_share for result in results), 2),
        spread((result.evicted / max(1, result.trained + result.evicted) for result in results), 2),
        spread((result.trained_length_ratio or 0.0 for result in results), 2),
        spread((result.mean_trained_lag for result in results), 1),
        spread((result.max_trained_lag for result in results), 0),
        *(spread((r.limited_by[name] for r in results), 2) for name in ("reserve_ahead", "max_lag", "stragglers")),
    ]


def plot(path: Path, curves: dict[str, list[Finished]]) -> None:
    """Held-out score over updates, the mean of the seeds, one line per setting."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, finished in curves.items():
        steps = [line["step"] for line in finished[0].evals]
        scores = [[line["eval/score"] for line in run.evals] for run in finished]
        means = [sum(column) / len(column) for column in zip(*scores, strict=True)]
        axes.plot(steps, means, "--" if "uncorrected" in label else "-", label=label.replace("lag", "max_lag"))
    axes.set(xlabel="update", ylabel="held-out exact match", title="recipes/arithmetic.py, mean of the seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--plot", type=Path, help="where to save the learning curves: .svg, .png, .pdf")
    arguments = parser.parse_args()
    runs_dir, seeds = arguments.runs_dir.resolve(), range(arguments.seeds)
    lags = {settings: [run(settings, seed, runs_dir) for seed in seeds] for settings in LAGS}
    print(f"\nrecipes/arithmetic.py, {arguments.seeds} seeds: mean [least, most]\n")
    head = ["setting", "final held-out score", "mean lag of a token", "effective sample share", "wall clock, s"]
    print(table(head, [lag_row(*item) for item in lags.items()]))
    if arguments.plot:
        plot(arguments.plot, {settings.label: finished for settings, finished in lags.items()})
    rules = {settings: [run(settings, seed, runs_dir) for seed in seeds] for settings in RULES}
    print("\nlong_tail.py\n")
    print(table(RULE_COLUMNS, [rule_row(*item) for item in rules.items()]))


if __name__ == "__main__":
    main()
