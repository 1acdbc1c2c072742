"""A run and its fork, update by update: the same update of both had the same rollouts, or at least the same prompts. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

PAIRED = ("reward/mean", "eval/score", "response_length/mean", "actor/entropy", "actor/grad_norm", "gap/ess")

Metrics = Mapping[int, Mapping[str, float]]  # of each update


class PairedMetric(Struct, frozen=True):
    """A metric that both have, over the updates at which both have it."""

    metric: str
    rollouts: Literal["log", "live"]  # whether the fork trained what the source had logged, or made its own
    updates: int
    source: float  # means
    fork: float
    difference: float
    error: float  # standard error of the difference, as if updates were independent; infinite for one update


def paired(source: Metrics, fork: Metrics, names: Sequence[str] = PAIRED) -> list[PairedMetric]:
    """Updates that the fork trained from the log stand apart."""
    found = []
    logged = [update for update, metrics in fork.items() if metrics.get("training/replayed")]
    live = [update for update in fork if update not in set(logged)]
    kinds: tuple[tuple[Literal["log", "live"], list[int]], ...] = (("log", logged), ("live", live))
    for kind, updates in kinds:
        for name in names:
            pairs = [(source[u][name], fork[u][name]) for u in updates if name in source.get(u, {}) and name in fork[u]]
            if pairs:
                found.append(_compared(name, kind, pairs))
    return found


def _compared(name: str, kind: Literal["log", "live"], pairs: Sequence[tuple[float, float]]) -> PairedMetric:
    n = len(pairs)
    (one, other), apart = (math.fsum(values) / n for values in zip(*pairs, strict=True)), [b - a for a, b in pairs]
    mean = other - one
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in apart) / (n - 1) / n) if n > 1 else math.inf
    return PairedMetric(name, kind, n, one, other, mean, error)


def paired_lines(source: Metrics, fork: Metrics, names: Sequence[str] = PAIRED) -> list[str]:
    """The same for a terminal, a line each."""
    lines = [f"{'fork − source':<22} {'updates':>8} {'source':>10} {'fork':>10}   difference"]
    for of in paired(source, fork, names):
        figures = f"{of.source:>10.4g} {of.fork:>10.4g}   {of.difference:+.4g} ± {of.error:.2g}"
        lines.append(f"{of.metric:<22} {of.updates:>3} {of.rollouts:<4} {figures}")
    return lines
