"""A run and its fork, update by update: the same update of both had the same rollouts, or at least the same prompts. Pure."""

import math
from collections.abc import Mapping, Sequence

PAIRED = ("reward/mean", "eval/score", "response_length/mean", "actor/entropy", "actor/grad_norm", "gap/ess")

Metrics = Mapping[int, Mapping[str, float]]  # of each update


def paired_lines(source: Metrics, fork: Metrics, names: Sequence[str] = PAIRED) -> list[str]:
    """A line for each metric that both have: how many updates, both means, and the mean of the differences with its standard
    error (infinite for one update; as if updates were independent). Updates that the fork trained from the log stand apart.
    """
    lines = [f"{'fork − source':<22} {'updates':>8} {'source':>10} {'fork':>10}   difference"]
    logged = [update for update, metrics in fork.items() if metrics.get("training/replayed")]
    live = [update for update in fork if update not in set(logged)]
    for kind, updates in (("log", logged), ("live", live)):
        for name in names:
            pairs = [(source[u][name], fork[u][name]) for u in updates if name in source.get(u, {}) and name in fork[u]]
            if pairs:
                lines.append(f"{name:<22} {len(pairs):>3} {kind:<4} {_figures(pairs)}")
    return lines


def _figures(pairs: Sequence[tuple[float, float]]) -> str:
    n = len(pairs)
    (one, other), apart = (math.fsum(values) / n for values in zip(*pairs, strict=True)), [b - a for a, b in pairs]
    mean = other - one
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in apart) / (n - 1) / n) if n > 1 else math.inf
    return f"{one:>10.4g} {other:>10.4g}   {mean:+.4g} ± {error:.2g}"
