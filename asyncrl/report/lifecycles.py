"""When what happened to rollouts, groups and updates, from columns of a run's log: seconds since the epoch, NaN: it did not.

Clocks of several machines may differ: no hop is earlier here than the one before it.
"""

import math
from collections.abc import Mapping
from heapq import heappop, heappush

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from msgspec.structs import replace

COLUMNS = [
    "group", "rollout", "attempt", "baseline", "purpose", "data_source", "worker", "times", "oldest", "finish_reason", "status",
    "reward", "scorer", "scoring_began", "scoring_ended", "trained_update", "submitted_time", "scored_time",
]  # fmt: skip
EVENT_COLUMNS = ["kind", "time", "group", "update", "incarnation", "outcome", "worker"]
EVENT_KINDS = [
    "reserved", "settled", "leased", "committed", "fenced", "died", "retained", "eval_requested", "eval_pinned", "evaluated",
    "ended",
]  # fmt: skip
Steps = Mapping[tuple[int, int], Mapping[str, float]]  # metrics of commits, by incarnation and update
_HOPS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.float64())]))


class Hops:
    """For pieces of a log while it is read: columns `started` and `finished` in place of `times`. Keeps the swaps."""

    def __init__(self) -> None:
        self.swaps: dict[tuple[str, int], float] = {}  # by generator and update

    def __call__(self, rows: pa.Table) -> pa.Table:
        lists = rows.column("times").combine_chunks().cast(_HOPS)
        of = np.repeat(np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))
        names, times = lists.flatten().flatten()
        at = times.to_numpy(zero_copy_only=False)
        swaps = pc.starts_with(names, "swap ").to_numpy(zero_copy_only=False)
        workers = rows.column("worker").take(pa.array(of[swaps])).to_pylist()
        for worker, name, time in zip(workers, names.filter(pa.array(swaps)).to_pylist(), at[swaps].tolist(), strict=True):
            self.swaps[worker, int(name.removeprefix("swap "))] = time
        rows = rows.drop_columns("times")
        for name in ("started", "finished"):
            found, here = np.full(len(rows), np.nan), pc.equal(names, name).to_numpy(zero_copy_only=False)
            found[of[here]] = at[here]
            rows = rows.append_column(name, pa.array(found))
        return rows


class UpdateSpan(Struct, frozen=True):
    """One commit, and the step that made it."""

    update: int
    incarnation: int
    leased: float  # when its batch was handed out, which may be during the step before
    begin: float  # of the step
    end: float
    undone: bool  # by a restart from an older checkpoint
    before: tuple[
        tuple[str, float, float], ...
    ]  # what the learner did between the commit before and the step: name, begin, end


def updates_of(events: pa.Table, steps: Steps) -> list[UpdateSpan]:
    """All commits in order. A step takes as long as its metrics say; else it begins with the lease, or the commit before."""
    found: list[UpdateSpan] = []
    standing: list[int] = []  # places of those that are not undone
    undone: set[int] = set()
    leased: dict[int, float] = {}
    end = math.nan
    for e in _of_kinds(events, "leased", "committed", "fenced").select(["kind", "time", "update", "incarnation"]).to_pylist():
        update, time = e["update"], e["time"]
        if e["kind"] == "leased":
            leased[update + 1] = time
            while standing and found[standing[-1]].update > update:
                undone.add(standing.pop())
            continue
        if e["kind"] == "committed":
            standing.append(len(found))
            metrics = steps.get((e["incarnation"], update), {})
            found.append(_update(update, e["incarnation"], leased.get(update, time), end, time, metrics))
        end = time
    return [replace(u, undone=place in undone) for place, u in enumerate(found)]


def _update(
    update: int, incarnation: int, leased: float, before: float, end: float, metrics: Mapping[str, float]
) -> UpdateSpan:
    """before: when the commit before ended, or the learner started; NaN: not known."""
    took = metrics.get("timing_s/step")
    begin = min(end, max(leased if took is None else end - took, end if math.isnan(before) else before))
    parts, at = [], begin if math.isnan(before) else before
    for name in ("publish", "checkpoint"):
        until = min(begin, at + metrics.get(f"timing_s/{name}", 0.0))
        parts += [(name, at, until)] if until > at else []
        at = until
    waits = max(at, begin - metrics.get("timing_s/wait_batch", 0.0))
    parts += [("wait for a batch", waits, begin)] if begin > waits else []
    return UpdateSpan(update, incarnation, min(leased, begin), begin, end, False, tuple(parts))


def moments(rollouts: pa.Table) -> dict[str, np.ndarray]:
    """By hop, for each rollout. `began` and `ended`: of scoring; without a scorer from the submission to the verdict."""
    started, finished, submitted, scored, began, ended = (
        floats(rollouts, name)
        for name in ("started", "finished", "submitted_time", "scored_time", "scoring_began", "scoring_ended")
    )
    finished = np.fmin(finished, submitted)
    began = np.where(np.isnan(began), submitted, np.minimum(np.maximum(began, submitted), scored))
    ended = np.where(np.isnan(ended), scored, np.minimum(np.maximum(ended, began), scored))
    return {"started": np.fmin(started, finished), "finished": finished, "began": began, "ended": ended}


class GroupSpans:
    """By group, parallel arrays: its number; `hops` [groups, 5], rising: reserved, generated, scored, leased and trained (or
    settled, or held out and scored, or where the log ends); and its outcome."""

    PHASES = ("generating", "scoring", "ready", "training")

    def __init__(self, rollouts: pa.Table, events: pa.Table, updates: Mapping[int, UpdateSpan], end: float) -> None:
        """updates: that stand, by number. end: of the log."""
        reserved, settled = _of_kinds(events, "reserved"), _of_kinds(events, "settled")
        self.groups, first = np.unique(reserved.column("group").to_numpy(), return_index=True)
        count = len(self.groups)
        hops = np.full((count, 5), np.nan)
        hops[:, 0] = floats(reserved, "time")[first]
        of = np.searchsorted(self.groups, rollouts.column("group").to_numpy())
        for hop, name in ((1, "submitted_time"), (2, "scored_time")):
            hops[:, hop] = -np.inf
            with np.errstate(invalid="ignore"):
                np.maximum.at(hops[:, hop], of, floats(rollouts, name))  # NaN, while one has none
        hops[~np.isfinite(hops)] = np.nan
        trained = np.full(count, np.nan)
        trained[of] = floats(rollouts, "trained_update")
        self.outcomes = np.full(count, "pending", object)
        held_out = np.zeros(count, bool)
        held_out[of] = pc.equal(rollouts.column("purpose"), "eval").to_numpy()
        hops[held_out, 4] = hops[held_out, 2]
        self.outcomes[held_out] = "held out"
        place = np.searchsorted(self.groups, settled.column("group").to_numpy())
        hops[place, 4] = floats(settled, "time")
        self.outcomes[place] = settled.column("outcome").to_pylist()
        for at in np.flatnonzero(~np.isnan(trained)).tolist():
            if update := updates.get(int(trained[at])):
                hops[at, 3:] = update.leased, update.end
                self.outcomes[at] = f"trained by update {update.update}"
        hops[np.isnan(hops[:, 4]), 4] = end
        for hop in (3, 2, 1):  # what did not happen takes no time, at the end
            hops[:, hop] = np.fmin(hops[:, hop], hops[:, hop + 1])
        self.hops = np.maximum.accumulate(hops, axis=1)


def packed(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """For each slice [begin, end) a lane, from 0 on, in which no other overlaps it: the lowest that is free."""
    lanes = np.zeros(len(begin), np.int64)
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    opened = 0
    order = begin.argsort(kind="stable")
    for at, since, until in zip(order.tolist(), begin[order].tolist(), end[order].tolist(), strict=True):
        while busy and busy[0][0] <= since:
            heappush(free, heappop(busy)[1])
        if free:
            lane = heappop(free)
        else:
            lane, opened = opened, opened + 1
        lanes[at] = lane
        heappush(busy, (until, lane))
    return lanes


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A column; NaN for null."""
    found: np.ndarray = pc.cast(table.column(name), pa.float64()).to_numpy()
    return found


def _of_kinds(events: pa.Table, *kinds: str) -> pa.Table:
    return events.filter(pc.is_in(events.column("kind"), pa.array(kinds)))
