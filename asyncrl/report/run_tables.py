"""What a page shows of one run, as tables of numbers: each has `update`, `time` (seconds since the run began) and columns over
them, short enough to draw. Pure: what was read of the run comes in as `ReadRun`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from asyncrl.report.estimates import estimate, wilson
from asyncrl.report.figures import PER_LAG
from asyncrl.report.series import Line, MetricLines, buckets, column, metric_names, shortened, thinned, totals

Table = dict[str, Any]  # for JSON
_STATE = re.compile(r"(.+?)/(busy|sync|wait:[^/]+)_s")
_UNACCOUNTED = "unaccounted"
_ACTORS = 24  # shown one by one; more are averaged by role
_LAG = re.compile(r"staleness/lag_(\d+)")


@dataclass(kw_only=True)
class ReadRun:
    """A run, as far as it was read. Arrays named together are parallel; times in seconds since the epoch."""

    name: str
    state: str  # how it stands, in words
    metrics: MetricLines
    settings: dict[str, Any]  # of recipe and deployment, by dotted name
    began: float
    commit_updates: np.ndarray  # rising
    commit_times: np.ndarray
    reward_updates: np.ndarray  # of each trained group, rising: the update, and the mean reward of its rollouts
    reward_means: np.ndarray
    split_updates: np.ndarray  # of each update, rising, the mean over its tokens: updates made while they were in flight, and
    split_flight: np.ndarray  # while their rollout was in the queue
    split_queue: np.ndarray
    lost: Mapping[str, np.ndarray] = field(default_factory=dict)  # when groups were evicted, …
    marks: Sequence[tuple[float, str, str]] = ()  # time, kind, text: what happened
    prompts_per_eval: float = 0.0  # 0: not known

    def reward_means_by_update(self) -> np.ndarray:
        """The mean over the groups of each update."""
        _, place = np.unique(self.reward_updates, return_inverse=True)
        means: np.ndarray = np.bincount(place, self.reward_means) / np.maximum(1, np.bincount(place))
        return means


def run_tables(facts: ReadRun, most: int) -> dict[str, Table]:
    """The tables that the run has something for; at most so many buckets each."""
    tables = {
        "steps": _steps(facts, most),
        "rewards": _rewards(facts, most),
        "evals": _evals(facts, most),
        "split": _split(facts, most),
        "lost": _lost(facts, most // 4),
        **{f"waits/{actor}": table for actor, table in _waits(facts, most // 2).items()},
        "gauges": _gauges(facts, most // 2),
    }
    return {name: table for name, table in tables.items() if table["columns"]}


def _table(facts: ReadRun, update: np.ndarray, time: np.ndarray, columns: Mapping[str, Any]) -> Table:
    """columns: arrays, or `thinned` ones. One without any number is left out."""
    short: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values, dict):
            known = np.isfinite(values["mean"]).any()
            exact = all(
                np.array_equal(values["mean"], end, equal_nan=True) or np.isnan(end).all()
                for end in (values["low"], values["high"])
            )
            told = shortened(values["mean"]) if exact else {part: shortened(array) for part, array in values.items()}
        else:
            known, told = np.isfinite(values).any(), shortened(values)
        if known:
            short[name] = told
    return {"update": shortened(update), "time": np.round(time - facts.began, 2).tolist(), "columns": short}


def _at_update(facts: ReadRun, times: np.ndarray) -> np.ndarray:
    """How many updates were made by then, with parts of one in between; only the surviving lineage counts."""
    if not len(facts.commit_times):
        return np.zeros(len(times))
    found: np.ndarray = np.interp(times, [facts.began, *facts.commit_times], [0, *facts.commit_updates])
    return found


def _steps(facts: ReadRun, most: int) -> Table:
    """All metrics of updates, and what was trained per second."""
    lines = facts.metrics.steps
    edges = buckets(len(lines), most)
    if not lines:
        return {"columns": {}}
    updates, times = column(lines, "step"), column(lines, "time")
    last = edges[1:] - 1
    spent = np.diff(times[last], prepend=facts.began)
    found: dict[str, Any] = {}
    for name in metric_names(lines):
        if name not in ("sequence", "time", "step", "incarnation"):
            figures = thinned(column(lines, name), edges)
            found[name] = figures["mean"] if PER_LAG.fullmatch(name) else figures
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, rate in (("samples", "samples_per_s"), ("tokens/trained", "tokens_per_s")):
            found[f"rate/{rate}"] = np.where(spent > 0, totals(column(lines, name), edges) / spent, np.nan)
    return _table(facts, updates[last], times[last], found)


def _rewards(facts: ReadRun, most: int) -> Table:
    """Mean reward with its interval over prompts, whose rollouts are correlated: a group counts as one."""
    updates = np.unique(facts.reward_updates)
    if not len(updates):
        return {"columns": {}}
    ends = updates[buckets(len(updates), most)[1:] - 1]
    starts = np.searchsorted(facts.reward_updates, [-1, *ends], side="right")
    found = [estimate(facts.reward_means[a:b].tolist()) for a, b in pairwise(starts)]
    parts = {"mean": "mean", "low": "low", "high": "high"}
    figures = {part: np.array([getattr(one, name) for one in found], np.float64) for part, name in parts.items()}
    times = np.interp(ends, facts.commit_updates, facts.commit_times)
    return _table(facts, ends.astype(np.float64), times, {"reward": figures})


def _evals(facts: ReadRun, most: int) -> Table:
    """Held-out scores; shares with Wilson's interval at as many draws as there were prompts."""
    lines = facts.metrics.evals[:: max(1, len(facts.metrics.evals) // most)]
    found: dict[str, Any] = {}
    for name in metric_names(lines):
        values = column(lines, name)
        if name.startswith("eval/score") and facts.prompts_per_eval and ((values >= 0) & (values <= 1)).all():
            bounds = np.array([wilson(value, facts.prompts_per_eval) for value in values])
            found[name] = {"mean": values, "low": bounds[:, 0], "high": bounds[:, 1]} if name == "eval/score" else values
        elif name.startswith("eval/"):
            found[name] = values
    return _table(facts, column(lines, "step"), column(lines, "time"), found)


def _split(facts: ReadRun, most: int) -> Table:
    edges = buckets(len(facts.split_updates), most)
    if len(edges) < 2:
        return {"columns": {}}
    means = {name: thinned(of, edges)["mean"] for name, of in (("flight", facts.split_flight), ("queue", facts.split_queue))}
    ends = facts.split_updates[edges[1:] - 1]
    return _table(facts, ends.astype(np.float64), np.interp(ends, facts.commit_updates, facts.commit_times), means)


def lag_map(facts: ReadRun, most: int) -> Table | None:
    """`share` of the trained tokens by bucket of updates and lag."""
    lines = facts.metrics.steps
    lags = sorted(int(match[1]) for name in metric_names(lines) if (match := _LAG.fullmatch(name)))
    if not lags:
        return None
    edges = buckets(len(lines), most)
    share = np.zeros((len(edges) - 1, lags[-1] + 1))
    for lag in lags:
        share[:, lag] = totals(column(lines, f"staleness/lag_{lag}"), edges) / np.diff(edges)
    last = edges[1:] - 1
    times = np.round(column(lines, "time")[last] - facts.began, 2).tolist()
    return {"update": column(lines, "step")[last].tolist(), "time": times, "share": np.round(share, 3).tolist()}


def _lost(facts: ReadRun, most: int) -> Table:
    """How many groups and rollouts were lost, by time."""
    times = np.concatenate([np.zeros(0), *facts.lost.values(), facts.commit_times])
    if not len(times) or not any(map(len, facts.lost.values())):
        return {"columns": {}}
    edges = np.linspace(facts.began, max(times.max(), facts.began + 1e-3), most + 1)
    counts = {name: np.histogram(of, edges)[0].astype(np.float64) for name, of in facts.lost.items() if len(of)}
    return _table(facts, _at_update(facts, edges[1:]), edges[1:], counts)


def actor_states(lines: Sequence[Line]) -> dict[str, dict[str, np.ndarray]]:
    """By actor and state: the seconds spent in it since the line before. An actor that was restarted begins at nothing."""
    found = _seconds(lines)
    for states in found.values():
        states |= {state: _carried(seconds) for state, seconds in states.items()}
        fresh = np.any([np.diff(seconds, prepend=0.0) < 0 for seconds in states.values()], axis=0)
        for state, seconds in states.items():
            states[state] = np.where(fresh, seconds, np.diff(seconds, prepend=0.0))
    return found


def _seconds(lines: Sequence[Line]) -> dict[str, dict[str, np.ndarray]]:
    """By actor and state: the seconds since it started, 0 before it was first in that state; NaN where it said nothing."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in metric_names(lines):
        if match := _STATE.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = column(lines, name)
    for states in found.values():
        there = np.isfinite(np.array([*states.values()])).any(axis=0)
        for state, seconds in states.items():
            states[state] = np.where(there, np.nan_to_num(seconds), np.nan)
    return found


def started_again(lines: Sequence[Line]) -> list[tuple[float, str]]:
    """When, to the next line, and who: actors whose seconds began anew."""
    times, found = column(lines, "time"), []
    for actor, states in _seconds(lines).items():
        whole = _carried(np.array([*states.values()]).sum(axis=0))
        found += [(float(times[at]), actor) for at in np.flatnonzero(np.diff(whole, prepend=0.0) < 0)]
    return found


def _carried(values: np.ndarray) -> np.ndarray:
    """NaN replaced by the value before it, at first by 0."""
    at = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(1, len(values) + 1), 0))
    carried: np.ndarray = np.array([0.0, *values])[at]
    return carried


def _waits(facts: ReadRun, most: int) -> dict[str, Table]:
    """By actor: the share of its time in each state; what nobody accounts for is mostly a restart."""
    lines = facts.metrics.actors
    if not lines:
        return {}
    edges, times = buckets(len(lines), most), column(lines, "time")
    last = edges[1:] - 1
    spent = np.maximum(np.diff(times[last], prepend=facts.began), 1e-9)
    actors = actor_states(lines)
    roles = {actor: re.sub(r"-\d+$", " (mean of all)", actor) if len(actors) > _ACTORS else actor for actor in actors}
    found = {}
    for role in dict.fromkeys(roles.values()):
        members = [actors[actor] for actor, own in roles.items() if own == role]
        states = dict.fromkeys(state for member in members for state in member)
        shares = {
            state: np.mean([totals(member[state], edges) if state in member else 0 * spent for member in members], axis=0)
            / spent
            for state in states
        }
        whole = np.sum([*shares.values()], axis=0)
        shares = {state: share / np.maximum(1.0, whole) for state, share in shares.items()}
        shares[_UNACCOUNTED] = np.maximum(0.0, 1.0 - whole)
        found[role] = _table(facts, _at_update(facts, times[last]), times[last], shares)
    return found


def _gauges(facts: ReadRun, most: int) -> Table:
    """What actors said of themselves besides: queues, and what they get done per second."""
    lines = facts.metrics.actors
    edges = buckets(len(lines), most)
    found = (
        {n: thinned(column(lines, n), edges)["mean"] for n in metric_names(lines) if "/" in n and not _STATE.fullmatch(n)}
        if lines
        else {}
    )
    times = column(lines, "time")[edges[1:] - 1]
    return _table(facts, _at_update(facts, times), times, found)


def run_marks(facts: ReadRun) -> list[dict[str, Any]]:
    """What happened, placed on both axes."""
    times = np.array([time for time, _, _ in facts.marks], np.float64)
    places = zip(_at_update(facts, times).round(2).tolist(), (times - facts.began).round(2).tolist(), facts.marks, strict=True)
    return [{"update": update, "time": time, "kind": kind, "text": text} for update, time, (_, kind, text) in places]
