"""Lines of metrics as columns, and long columns made short enough to draw: the mean of each bucket of updates, with its least
and greatest value. Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

_DIGITS = 5  # that a plot can show
_SHOWN = re.compile(r".*/(?:(?:busy|sync|wait:[^/]+)_s|tokens_per_s|scores_per_s|limit/[^/]+|unscored|ready|in_flight)$")

Line = dict[str, Any]


@dataclass(kw_only=True)
class MetricLines:
    """metrics.jsonl by kind of line, in the order of updates and of time."""

    steps: list[Line] = field(default_factory=list)
    evals: list[Line] = field(default_factory=list)
    actors: list[Line] = field(default_factory=list)  # what plots need of them
    scalings: list[Line] = field(default_factory=list)  # decisions about how many actors there should be


def read_metrics(lines: Iterable[bytes], newest: int | None = None) -> MetricLines:
    """A step or evaluation that was made again after a restore takes the place of the first, and of what came after that.

    newest: the update at which the run stands; later ones were undone. A line that is cut short is passed over.
    """
    found = MetricLines()
    for text in lines:
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.MsgspecError:
            continue
        if line.get("kind") == "actors":
            found.actors.append({name: v for name, v in line.items() if name in ("time", "step") or _SHOWN.match(name)})
        elif line.get("kind") == "scale":
            found.scalings.append(line)
        elif line.get("kind") in ("step", "eval") and (newest is None or line["step"] <= newest):
            kept = found.steps if line["kind"] == "step" else found.evals
            while kept and kept[-1]["step"] >= line["step"]:
                kept.pop()
            kept.append(line)
    return found


def metric_names(lines: Sequence[Line]) -> list[str]:
    """Of all numbers in the lines, as they come."""
    newest: Line = {}
    for line in lines:
        newest |= line
    return [name for name, value in newest.items() if value is None or isinstance(value, float | int)]


def column(lines: Sequence[Line], name: str) -> np.ndarray:
    """float64 [lines]; NaN where a line has no such number."""
    return np.array([line.get(name) for line in lines], np.float64)


def buckets(count: int, most: int) -> np.ndarray:
    """Where each of at most `most` buckets, of equally many lines, begins, and the end; one each if there are few."""
    return np.unique(np.linspace(0, count, min(count, most) + 1).astype(np.int64))


def thinned(values: np.ndarray, edges: np.ndarray) -> dict[str, np.ndarray]:
    """`mean`, `low` and `high` of each bucket; NaN of one without a number."""
    known = np.isfinite(values)
    values = np.where(known, values, np.nan)
    with np.errstate(invalid="ignore"):
        mean = totals(values, edges) / np.add.reduceat(known, edges[:-1], dtype=np.int64)
    return {"mean": mean, "low": np.fmin.reduceat(values, edges[:-1]), "high": np.fmax.reduceat(values, edges[:-1])}


def totals(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The sum in each bucket, of what is a number."""
    sums: np.ndarray = np.add.reduceat(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0), edges[:-1])
    return sums


def shortened(values: np.ndarray) -> list[float | None]:
    """For JSON: rounded to what a plot can show, null where there is no number."""
    known = np.isfinite(values) & (values != 0)
    scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(values, where=known, out=np.ones(len(values))))))
    rounded = np.where(np.isfinite(scale), np.round(values * scale) / scale, values)
    return [None if value != value or abs(value) == np.inf else value for value in rounded.tolist()]
