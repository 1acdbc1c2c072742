"""A run as a trace for Perfetto or chrome://tracing (the Trace Event Format), from columns of its log alone.

    learner         updates, and what it did in between; marks: restarts, checkpoints, evaluations
    generator-0 …   a lane per slot: rollouts as they were generated; marks: its swaps and its deaths
    reward-0 …      a lane per process: what it scored
    store           a lane per group under way: generating, scoring, ready, training; counters
    arrows          from each trained rollout to the update that trained it

Which slot a rollout had is not in the log: lanes are filled so that nothing overlaps.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from asyncrl.report.lifecycles import GroupSpans, Steps, UpdateSpan, floats, moments, packed, updates_of

_LEARNER, _STORE, _OTHERS = 1, 2, 10  # process numbers; those of generators and rewards follow
_MARKS = 0  # the lane of marks; slots and processes are numbered from 1 on
_AT_ONCE = 1 << 14  # lines that are objects at a time
_SAID = {
    "fenced": "learner restarts as incarnation {incarnation}",
    "retained": "older checkpoints go",
    "eval_requested": "evaluation of update {update} asked for",
    "eval_pinned": "evaluation pinned to update {update}",
    "evaluated": "update {update} is evaluated",
    "ended": "end of the run",
    "died": "died",
}


class TraceEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One event of the format; ts and dur in µs. What is at its default is not written."""

    name: str
    ph: Literal["X", "i", "s", "f", "C", "M"]
    ts: int
    pid: int
    tid: int
    cat: str = ""
    dur: int | None = None
    id: int | None = None  # of an arrow: the same at both its ends
    bp: str = ""  # "e": an arrow ends at the slice around it
    s: str = ""  # how far a mark reaches: "g" over all, "p" over its process
    args: dict[str, Any] = {}


class RunTrace:
    """Works out what to show; `events` then makes one event after the other.

    rollouts: the log's lifecycles.COLUMNS, made by a `Hops`, whose `swaps` these are. events: EVENT_COLUMNS of EVENT_KINDS,
    in order. first and last: only these updates, what they trained, and whatever else happened meanwhile. Memory: some numbers
    for each rollout.
    """

    def __init__(
        self,
        rollouts: pa.Table,
        events: pa.Table,
        swaps: Mapping[tuple[str, int], float],
        steps: Steps,
        *,
        first: int | None = None,
        last: int | None = None,
    ) -> None:
        hops = [floats(rollouts, name) for name in ("started", "finished", "submitted_time", "scored_time")]
        known = np.concatenate([floats(events, "time"), *hops, [np.nan]])
        self.zero, end = (0.0, 0.0) if np.isnan(known).all() else (float(np.nanmin(known)), float(np.nanmax(known)))
        updates = updates_of(events, steps)
        groups = GroupSpans(rollouts, events, {u.update: u for u in updates if not u.undone}, end)
        low, high = -math.inf if first is None else first, math.inf if last is None else last
        self.updates = [u for u in updates if low <= u.update <= high]
        since = max((u.end for u in updates if u.update < low), default=-math.inf)
        self._window = since, math.inf if last is None else max((u.end for u in self.updates), default=since)
        trained, untrained = floats(rollouts, "trained_update"), self._within(floats(rollouts, "submitted_time"))
        self._rollouts = rollouts.filter(pa.array(np.where(np.isnan(trained), untrained, (low <= trained) & (trained <= high))))
        shown = np.isin(groups.groups, self._rollouts.column("group").to_numpy()) | self._within(groups.hops[:, 0])
        self._groups, self._outcomes, self._hops = groups.groups[shown], groups.outcomes[shown], groups.hops[shown]
        marks = events.filter(pc.is_in(events.column("kind"), pa.array(list(_SAID)))).to_pylist()
        self._marks = [mark for mark in marks if self._within(mark["time"])]
        self._swaps = {key: at for key, at in swaps.items() if self._within(at)}

    def events(self) -> Iterator[TraceEvent]:
        """Slices stand before the arrows that begin or end in them."""
        yield from self._of_learner()
        yield from self._of_rollouts()
        yield from self._of_groups()
        yield from self._counters()

    def _within(self, time: Any) -> Any:
        return (time > self._window[0]) & (time <= self._window[1])

    def _us(self, seconds: np.ndarray) -> np.ndarray:
        """µs from `zero` on; 0 for NaN."""
        return np.rint(np.nan_to_num(seconds - self.zero) * 1e6).astype(np.int64)

    def _at(self, seconds: float) -> int:
        return round((seconds - self.zero) * 1e6)

    def _mark(self, pid: int, name: str, time: float, s: str = "p") -> TraceEvent:
        return TraceEvent(name=name, ph="i", ts=self._at(time), pid=pid, tid=_MARKS, cat="mark", s=s)

    # ----------------------------------------------------------------------------------------- learner

    def _of_learner(self) -> Iterator[TraceEvent]:
        yield from _named(_LEARNER, "learner", {_MARKS: "marks", 1: "learner"})
        for u in self.updates:
            parts = [*u.before, (f"update {u.update}{' (undone)' * u.undone}", u.begin, u.end)]
            for name, begin, end in parts:
                ts, until = self._at(begin), self._at(end)
                args = {"update": u.update, "incarnation": u.incarnation}
                dur = max(1, until - ts) if name == parts[-1][0] else until - ts
                yield TraceEvent(name=name, ph="X", ts=ts, dur=dur, pid=_LEARNER, tid=1, cat="learner", args=args)
                if name == "checkpoint":
                    yield self._mark(_LEARNER, f"checkpoint of update {u.update - 1}", begin)
        for mark in self._marks:
            if mark["kind"] != "died":
                reach = "g" if mark["kind"] in ("fenced", "ended") else "p"
                yield self._mark(_LEARNER, _SAID[mark["kind"]].format(**mark), mark["time"], reach)

    # ----------------------------------------------------------------------------------------- rollouts

    def _of_rollouts(self) -> Iterator[TraceEvent]:
        """What generators and reward processes did with them, and the arrows."""
        hops = {name: self._us(seconds) for name, seconds in moments(self._rollouts).items()}
        for begin, end in (("started", "finished"), ("began", "ended")):
            hops[end] = np.maximum(hops[end], hops[begin] + 1)  # what has no length is not seen
        slots = _Lanes(self._rollouts.column("worker"), hops["started"], hops["finished"], "slot")
        scored = pc.is_valid(self._rollouts.column("status"))
        scorers = self._rollouts.column("scorer")
        if scorers.null_count == len(scorers):  # written by a version that did not say
            scorers = pc.if_else(scored, "rewards", scorers)
        processes = _Lanes(pc.if_else(scored, scorers, pa.scalar(None, pa.string())), hops["began"], hops["ended"], "process")
        names = sorted({*slots.processes, *processes.processes, *(worker for worker, _ in self._swaps)})
        pids = {name: _OTHERS + at for at, name in enumerate(names)}
        for lanes in (slots, processes):
            for name, threads in lanes.threads().items():
                yield from _named(pids[name], name, {_MARKS: "marks"} | threads)
        for (worker, update), time in sorted(self._swaps.items(), key=lambda swap: swap[1]):
            yield self._mark(pids[worker], f"swap to update {update}", time)
        for mark in self._marks:
            if mark["kind"] == "died" and mark["worker"] in pids:
                yield self._mark(pids[mark["worker"]], "died", mark["time"], "g")
        updates = {u.update: u for u in self.updates if not u.undone}
        for first in range(0, len(self._rollouts), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            lines = self._rollouts.slice(first, _AT_ONCE).select(_TOLD).to_pylist()
            places = zip(slots.places(part, pids), processes.places(part, pids), strict=True)
            times = zip(*(hops[name][part].tolist() for name in ("started", "finished", "began", "ended")), strict=True)
            for at, (line, (slot, process), when) in enumerate(zip(lines, places, times, strict=True), first):
                yield from self._of_rollout(line, slot, process, when, updates.get(line["trained_update"]), at)

    def _of_rollout(
        self,
        line: dict[str, Any],
        slot: tuple[int, int] | None,
        process: tuple[int, int] | None,
        times: tuple[int, int, int, int],
        update: UpdateSpan | None,
        number: int,
    ) -> Iterator[TraceEvent]:
        started, finished, began, ended = times
        name, args = f"{line['group']}/{line['rollout']}", {key: value for key, value in line.items() if value is not None}
        if slot:
            pid, tid = slot
            yield TraceEvent(name=name, ph="X", ts=started, dur=finished - started, pid=pid, tid=tid, cat="generate", args=args)
        if process:
            pid, tid = process
            yield TraceEvent(name=name, ph="X", ts=began, dur=ended - began, pid=pid, tid=tid, cat="score", args=args)
        if slot and update and line["status"] == "ok" and not line["baseline"]:
            pid, tid = slot
            yield TraceEvent(name="trained", ph="s", ts=finished - 1, pid=pid, tid=tid, cat="train", id=number)
            into = max(self._at(update.begin), finished - 1)
            yield TraceEvent(name="trained", ph="f", bp="e", ts=into, pid=_LEARNER, tid=1, cat="train", id=number)

    # ------------------------------------------------------------------------------------------- store

    def _of_groups(self) -> Iterator[TraceEvent]:
        """A slice for each group, and one in it for each phase."""
        hops = np.stack([self._us(hop) for hop in self._hops.T], axis=1) if len(self._hops) else np.empty((0, 5), np.int64)
        hops[:, 4] = np.maximum(hops[:, 4], hops[:, 0] + 1)
        tids = 1 + packed(hops[:, 0], hops[:, 4])
        yield from _named(_STORE, "store", {int(tid): f"group {tid}" for tid in np.unique(tids)})
        groups = zip(self._groups.tolist(), self._outcomes.tolist(), hops.tolist(), tids.tolist(), strict=True)
        for group, outcome, times, tid in groups:
            where: dict[str, Any] = {"pid": _STORE, "tid": tid, "cat": "group"}
            args = {"group": group, "outcome": outcome}
            yield TraceEvent(name=f"group {group}", ph="X", ts=times[0], dur=times[4] - times[0], args=args, **where)
            for phase, begin, end in zip(GroupSpans.PHASES, times, times[1:], strict=False):
                if end > begin:
                    yield TraceEvent(name=phase, ph="X", ts=begin, dur=end - begin, **where)

    def _counters(self) -> Iterator[TraceEvent]:
        """Groups by what they wait for, at most once a millisecond, and the mean lag of what each update trained."""
        for name, since, until in (("generating or scored", 0, 2), ("ready", 2, 3)):
            times = np.concatenate([self._hops[:, since], self._hops[:, until]])
            change = np.repeat([1, -1], len(self._hops))
            at, of = np.unique(self._us(times) // 1000, return_inverse=True)
            counts = np.cumsum(np.bincount(of, weights=change, minlength=len(at))).astype(int)
            for ts, count in zip((at * 1000).tolist(), counts.tolist(), strict=True):
                yield TraceEvent(name=name, ph="C", ts=ts, pid=_STORE, tid=0, args={"groups": count})
        trained = floats(self._rollouts, "trained_update")
        known = ~np.isnan(trained)
        lag = (trained - 1 - floats(self._rollouts, "oldest"))[known]
        numbers, of = np.unique(trained[known].astype(int), return_inverse=True)
        means = dict(zip(numbers.tolist(), (np.bincount(of, lag) / np.bincount(of)).tolist(), strict=True)) if len(lag) else {}
        for u in self.updates:
            if not u.undone and u.update in means:
                args = {"updates": round(means[u.update], 3)}
                yield TraceEvent(name="mean lag of rollouts", ph="C", ts=self._at(u.end), pid=_LEARNER, tid=0, args=args)


_TOLD = [
    "group",
    "rollout",
    "attempt",
    "baseline",
    "purpose",
    "data_source",
    "finish_reason",
    "status",
    "reward",
    "trained_update",
]


class _Lanes:
    """Slices by process and lane. keys: PROCESS, or PROCESS/NUMBER, whose lanes are its own; null: shown nowhere."""

    def __init__(self, keys: pa.ChunkedArray, begin: np.ndarray, end: np.ndarray, called: str) -> None:
        found = pc.unique(keys).drop_null().to_pylist()
        self._keys, self._called = sorted(found, key=lambda key: (key.partition("/")[0], len(key), key)), called
        self._of = pc.fill_null(pc.index_in(keys, pa.array(self._keys, pa.string())), -1).to_numpy()
        self._tids = np.zeros(len(begin), np.int64)
        self._names: dict[str, dict[int, str]] = {}
        for place, key in enumerate(self._keys):
            (own,) = np.nonzero(self._of == place)
            lanes, threads = packed(begin[own], end[own]), self._names.setdefault(key.partition("/")[0], {})
            self._tids[own] = 1 + len(threads) + lanes
            threads |= {1 + len(threads) + lane: self._name(key, lane) for lane in range(int(lanes.max()) + 1)}

    def _name(self, key: str, lane: int) -> str:
        number = key.partition("/")[2]
        return f"{self._called} {number}{f' ({lane + 1})' if lane else ''}" if number else f"{self._called} {lane + 1}"

    @property
    def processes(self) -> list[str]:
        return list(self._names)

    def threads(self) -> dict[str, dict[int, str]]:
        """The names of the lanes, by process."""
        return self._names

    def places(self, part: slice, pids: Mapping[str, int]) -> list[tuple[int, int] | None]:
        """(pid, tid) of each slice."""
        known = [pids[key.partition("/")[0]] for key in self._keys]
        lines = zip(self._of[part].tolist(), self._tids[part].tolist(), strict=True)
        return [(known[of], tid) if of >= 0 else None for of, tid in lines]


def _named(pid: int, name: str, threads: Mapping[int, str]) -> Iterator[TraceEvent]:
    """The names of a process and of its lanes, which stand in this order."""
    about: dict[str, Any] = {"ph": "M", "ts": 0, "pid": pid}
    yield TraceEvent(name="process_name", tid=0, args={"name": name}, **about)
    yield TraceEvent(name="process_sort_index", tid=0, args={"sort_index": pid}, **about)
    for tid, called in threads.items():
        yield TraceEvent(name="thread_name", tid=tid, args={"name": called}, **about)
        yield TraceEvent(name="thread_sort_index", tid=tid, args={"sort_index": tid}, **about)
