"""What things cost in a run, from the rows of its replay log and from metrics.jsonl."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

import asyncrl.replay
from asyncrl.config.load import load_deployment
from asyncrl.errors import DataError
from asyncrl.rundir import RunDir
from asyncrl.simulate.costs import Costs, Lengths

_FEWEST, _SKIPPED = 10, 5  # updates; the first fifth of them, which are slower, is left out
_COLUMNS = ["purpose", "group", "span_lengths", "times", "worker", "outcome"]
_RANK = re.compile(r"learner(-\d+)?/busy_s")
Line = dict[str, Any]


def measure(path: str) -> tuple[Costs, Lengths, str]:
    """Costs, response lengths of groups, and how fast it went, in words. Raises DataError for a folder that is no run's, and
    a run in which too little happened."""
    run, replay = RunDir(path), asyncrl.replay.open(path)
    lines = [msgspec.json.decode(line) for line in run.metrics.read_bytes().splitlines()] if run.metrics.is_file() else []
    steps, actors, scalings = ([line for line in lines if line["kind"] == kind] for kind in ("step", "actors", "scale"))
    ranked = max((line["step"] for line in scalings if line["role"] == "learner"), default=0)  # other ranks, other costs
    steps = [line for line in steps if line["step"] > ranked]
    if len(steps) < _FEWEST or not actors:
        raise DataError(
            f"{run.metrics}: {len(steps)} finished updates < {_FEWEST}: too few to tell what things cost; let the run go on, "
            "or state costs.NAME=VALUE instead of --from"
        )
    deployment, first = load_deployment(run.deployment), len(steps) // _SKIPPED
    since, until, steps = steps[first]["time"], steps[-1]["time"], steps[first + 1 :]
    rows = [row | dict(row["times"]) for row in replay.rollouts(_COLUMNS).to_pylist()]
    rows = [row for row in rows if since <= row["started"] and row["finished"] <= until] or rows  # none, if all are long
    lengths: defaultdict[int, list[int]] = defaultdict(list)
    for row in rows:
        if row["purpose"] == "train":
            lengths[row["group"]].append(sum(row["span_lengths"]))
    outcomes = Counter({row["group"]: row["outcome"] for row in rows}.values())

    def total(role: str, figure: str) -> float:
        """Of all actors of a role, since they were started."""
        return sum(value for name, value in actors[-1].items() if name.startswith(role) and name.endswith(f"/{figure}"))

    pause_s = total("generator", "pause_s_total") / max(1, total("generator", "swaps"))
    generators = deployment.generators
    step_s, row_s = _decoding(rows, pause_s, generators.servers)
    tokens, seconds = (np.array([line[name] for line in steps]) for name in ("tokens/policy", "timing_s/step"))
    differ = np.full(len(steps), float(tokens.std() > 0.05 * tokens.mean()))  # where they don't, all is put down to tokens
    update_s, token_s = _fit(differ, tokens, seconds)
    beside = [line["timing_s/commit"] + line["timing_s/publish"] + line.get("timing_s/checkpoint", 0.0) for line in steps]
    costs = Costs(
        step_s=step_s,
        row_s=row_s,
        pause_s=pause_s,
        deliver_s=max(0.0, _usual_swap_s(actors, steps) - pause_s),
        update_s=update_s,
        token_s=token_s * max(1, sum(bool(_RANK.fullmatch(name)) for name in actors[-1])),
        publish_s=float(np.mean(beside)),
        score_s=total("reward", "busy_s") * deployment.rewards.processes / max(1, total("reward", "scored")),
        rows_s=float(np.mean([line["timing_s/rows"] for line in steps])),
        call_s=float(np.mean([line["timing_s/commit"] for line in steps])),
        filtered_share=outcomes["filtered"] / max(1, outcomes["filtered"] + outcomes["trained"]),
    )
    speed = sum(line["samples"] for line in steps) / (until - since)
    return costs, list(lengths.values()), f"{len(steps)} updates of that run, at {speed:,.1f} samples/s"


def _usual_swap_s(actors: Sequence[Line], steps: Sequence[Line]) -> float:
    """Seconds from a commit until a generator had swapped to it."""
    committed = {line["step"]: line["time"] for line in steps}
    names = {name for line in actors for name in line if name.endswith("/swapped_at")}
    swapped = [(line[name.replace("swapped_at", "update")], line[name]) for line in actors for name in names & line.keys()]
    return float(np.median([at - committed[update] for update, at in swapped if update in committed] or [0.0]))


def _decoding(rows: Sequence[Line], pause_s: float, servers: int) -> tuple[float, float]:
    """Seconds of a step, and those that each row adds. A rollout of T tokens took T steps, pauses aside;
    and these had as many rows in all as its generator then made tokens, if those of each rollout came evenly."""
    steps, made, seconds = [], [], []
    for worker in {row["worker"] for row in rows}:
        mine = [row for row in rows if row["worker"] == worker]
        length, began, ended = np.array([(sum(row["span_lengths"]), row["started"], row["finished"]) for row in mine]).T
        at, rate = np.concatenate([began, ended]), length / (ended - began)
        order = at.argsort()
        rates = np.cumsum(np.concatenate([rate, -rate])[order])[:-1]  # of the generator, from each of these times on
        until = np.append(0.0, np.cumsum(rates * np.diff(at[order])))
        steps.append(length)
        made.append(np.interp(ended, at[order], until) - np.interp(began, at[order], until))
        seconds.append(ended - began - pause_s * np.array([len(row["span_lengths"]) - 1 for row in mine]))
    return _fit(np.concatenate(steps), np.concatenate(made) / servers, np.concatenate(seconds))


def _fit(u: np.ndarray, v: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """a and b of y = a·u + b·v, neither negative, by least squares."""
    best = [np.linalg.lstsq(np.stack([u, v], 1), y, rcond=None)[0]]
    if best[0].min() < 0:
        best = [np.array([u @ y / (u @ u), 0.0]), np.array([0.0, v @ y / (v @ v)])]
    a, b = min(best, key=lambda ab: float(((y - ab[0] * u - ab[1] * v) ** 2).sum()))
    return float(a), float(b)
