"""Traces of made-up runs: the format, lanes in which nothing overlaps, and one arrow for each trained rollout."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from asyncrl.report.lifecycles import COLUMNS, EVENT_COLUMNS, Hops, packed, updates_of
from asyncrl.report.trace import RunTrace

Line = dict[str, Any]
SCHEMA = jsonschema.Draft202012Validator(json.loads(Path(__file__).with_name("trace_schema.json").read_text()))
_STRINGS = ("purpose", "data_source", "worker", "finish_reason", "status", "scorer", "kind", "outcome")
_FLOATS = ("reward", "scoring_began", "scoring_ended", "submitted_time", "scored_time", "time")
_TIMES = {"baseline": pa.bool_(), "times": pa.map_(pa.string(), pa.float64())}


def _table(lines: Sequence[Line], names: Sequence[str]) -> pa.Table:
    types = _TIMES | dict.fromkeys(_STRINGS, pa.string()) | dict.fromkeys(_FLOATS, pa.float64())
    return pa.table({n: pa.array([line.get(n) for line in lines], types.get(n, pa.int64())) for n in names})


class Made:
    """A run put together by hand: seconds from 1000 on."""

    def __init__(self) -> None:
        self.rollouts: list[Line] = []
        self.log: list[Line] = [{"kind": "fenced", "time": 1000.0, "incarnation": 1}]
        self.steps: dict[tuple[int, int], dict[str, float]] = {}

    def group(self, group: int, at: float, *lines: Line, **all_of_it: Any) -> None:
        """Reserved at `at`; a line for each rollout, generated within a second, scored 0.2 s later by two processes."""
        self.log.append({"kind": "reserved", "time": at, "group": group, "worker": "generator-0"})
        for rollout, line in enumerate(lines):
            took = all_of_it.get("took", 1.0)
            usual = {
                "group": group, "rollout": rollout, "attempt": 0, "baseline": False, "purpose": "train", "data_source": "sums",
                "worker": "generator-0", "times": [("reserved", at), ("started", at), ("finished", at + took)], "oldest": 0,
                "finish_reason": "stop", "status": "ok", "reward": 1.0, "scorer": f"reward-0/{rollout % 2}",
                "scoring_began": at + took + 0.15, "scoring_ended": at + took + 0.2, "submitted_time": at + took + 0.1,
                "scored_time": at + took + 0.2,
            }  # fmt: skip
            self.rollouts.append(usual | all_of_it | line)

    def commit(self, update: int, leased: float, end: float, *groups: int, incarnation: int = 1, **metrics: float) -> None:
        self.log += [
            {"kind": "leased", "time": leased, "update": update - 1},
            {"kind": "committed", "time": end, "update": update, "incarnation": incarnation},
        ]
        self.steps[incarnation, update] = {f"timing_s/{name}": value for name, value in metrics.items()}
        for line in self.rollouts:
            if line["group"] in groups:
                line["trained_update"] = update

    def trace(self, **limits: int) -> tuple[RunTrace, list[Line]]:
        hops = Hops()
        rollouts = hops(_table(self.rollouts, COLUMNS))
        trace = RunTrace(rollouts, _table(self.log, EVENT_COLUMNS), hops.swaps, self.steps, **limits)
        return trace, [json.loads(msgspec.json.encode(event)) for event in trace.events()]


def _check(events: Sequence[Line]) -> None:
    """Slices of a lane lie side by side or one in the other; each end of an arrow lies in a slice."""
    assert all(e["ts"] >= 0 and e.get("dur", 1) >= 1 for e in events)
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            lanes[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    for slices in lanes.values():
        open_until: list[int] = []
        for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert lanes.keys() <= named
    ends = [e for e in events if e["ph"] in "sf"]
    for e in ends:
        assert any(begin <= e["ts"] < end for begin, end in lanes[e["pid"], e["tid"]])
    by_id: dict[int, list[Line]] = defaultdict(list)
    for e in ends:
        by_id[e["id"]].append(e)
    for first, last in by_id.values():
        assert (first["ph"], last["ph"]) == ("s", "f")
        assert first["ts"] <= last["ts"]


def _slices(events: Sequence[Line], cat: str) -> dict[str, tuple[float, float]]:
    """(begin, end) in seconds by name."""
    return {e["name"]: (e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e["ph"] == "X" and e["cat"] == cat}


@pytest.fixture
def made() -> Made:
    run = Made()
    swapped = {"times": [("started", 1001.0), ("finished", 1001.9), ("swap 1", 1001.5)]}
    run.group(0, 1001.0, {}, {"baseline": True}, {"status": "invalid", "reward": None}, swapped)
    run.group(1, 1001.5, {}, {}, worker="generator-1")
    run.commit(1, 1003.0, 1004.0, 0, step=0.5, wait_batch=0.25, publish=0.25)
    run.group(2, 1002.0, {}, {})
    run.log.append({"kind": "settled", "time": 1003.5, "group": 2, "outcome": "filtered"})
    run.group(3, 1002.5, {}, purpose="eval")
    run.commit(2, 1003.5, 1006.0, 1, step=1.0, wait_batch=0.5, publish=0.125, checkpoint=0.25)
    run.log.append({"kind": "died", "time": 1006.5, "worker": "generator-1", "incarnation": 1})
    run.group(4, 1006.5, {}, scorer=None, status=None, scored_time=None, scoring_began=None, scoring_ended=None)
    return run


def test_what_is_shown_of_a_small_run(made: Made) -> None:
    trace, events = made.trace()
    _check(events)
    SCHEMA.validate({"traceEvents": events})
    assert trace.zero == 1000.0
    generated = _slices(events, "generate")
    assert generated["0/0"] == (1.0, 2.0)
    assert generated["1/1"] == (1.5, 2.5)
    assert generated.keys() == {"0/0", "0/1", "0/2", "0/3", "1/0", "1/1", "2/0", "2/1", "3/0", "4/0"}
    scored = _slices(events, "score")
    assert scored.keys() == generated.keys() - {"4/0"}
    assert scored["0/0"] == (2.15, 2.2)
    learner = _slices(events, "learner")
    assert learner["update 1"] == (3.5, 4.0)
    assert learner["update 2"] == (5.0, 6.0)
    assert learner["checkpoint"] == (4.125, 4.375)  # after the publish of update 1
    assert learner["wait for a batch"] == (4.5, 5.0)
    groups = _slices(events, "group")
    assert groups["group 0"] == (1.0, 4.0)
    assert groups["group 1"] == (1.5, 6.0)
    assert groups["group 2"] == (2.0, 3.5)
    assert groups["group 3"] == (2.5, 3.7)
    assert groups["group 4"] == (6.5, 7.6)  # the end of the log
    arrows = [e for e in events if e["ph"] == "f"]
    assert [e["ts"] for e in arrows] == [3_500_000] * 2 + [5_000_000] * 2  # no baseline, nothing invalid
    marks = {(e["name"], e["ts"] / 1e6) for e in events if e["ph"] == "i"}
    restarts = {("learner restarts as incarnation 1", 0.0), ("died", 6.5)}
    assert marks == restarts | {("swap to update 1", 1.5), ("checkpoint of update 1", 4.125)}
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"learner", "store", "generator-0", "generator-1", "reward-0"}
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} >= {"process 0", "process 1", "slot 1", "slot 4"}
    lags = [e["args"]["updates"] for e in events if e["name"] == "mean lag of rollouts"]
    assert lags == [0.0, 1.0]


def test_counters_go_back_to_what_is_left(made: Made) -> None:
    _, events = made.trace()
    values: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for e in events:
        if e["ph"] == "C" and "groups" in e["args"]:
            values[e["name"]].append((e["ts"] / 1e6, e["args"]["groups"]))
    assert values["generating or scored"][:5] == [(1.0, 1), (1.5, 2), (2.0, 3), (2.2, 2), (2.5, 3)]
    assert [count for _, count in values["ready"]][-1] == 0
    assert max(count for _, count in values["ready"]) == 2


@pytest.mark.parametrize(
    ("limits", "updates", "generated"),
    [
        ({"first": 2}, ["update 2"], {"1/0", "1/1", "4/0"}),
        ({"last": 1}, ["update 1"], {"0/0", "0/1", "0/2", "0/3", "2/0", "2/1", "3/0"}),
        ({"first": 3}, [], {"4/0"}),
        ({"first": 2, "last": 2}, ["update 2"], {"1/0", "1/1"}),
    ],
)
def test_only_some_updates(made: Made, limits: dict[str, int], updates: list[str], generated: set[str]) -> None:
    _, events = made.trace(**limits)
    _check(events)
    assert [name for name in _slices(events, "learner") if name.startswith("update")] == updates
    assert _slices(events, "generate").keys() == generated


def test_arrows_go_to_the_update_that_stands(made: Made) -> None:
    """Update 2 is undone by a restart from update 1, and trained again."""
    made.log.append({"kind": "fenced", "time": 1007.0, "incarnation": 2})
    made.commit(2, 1007.5, 1009.0, 1, incarnation=2, step=1.0)
    _, events = made.trace()
    _check(events)
    assert _slices(events, "learner")["update 2 (undone)"] == (5.0, 6.0)
    assert _slices(events, "learner")["update 2"] == (8.0, 9.0)
    assert [e["ts"] for e in events if e["ph"] == "f"] == [3_500_000] * 2 + [8_000_000] * 2
    assert [u.undone for u in updates_of(_table(made.log, EVENT_COLUMNS), made.steps)] == [False, True, False]


def test_a_log_of_a_version_without_scorers_has_one_process_of_rewards(made: Made) -> None:
    for line in made.rollouts:
        line |= {"scorer": None, "scoring_began": None, "scoring_ended": None}
    _, events = made.trace()
    _check(events)
    assert "rewards" in {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert _slices(events, "score")["0/0"] == (2.1, 2.2)  # from the submission on


def test_an_empty_log_is_a_trace() -> None:
    run = Made()
    run.log = []
    _, events = run.trace()
    _check(events)


_span = st.tuples(st.integers(0, 50), st.integers(1, 20))


@given(st.lists(_span, max_size=30))
def test_packed_lanes_hold_nothing_twice_and_are_as_few_as_can_be(spans: list[tuple[int, int]]) -> None:
    begin, end = np.array([b for b, _ in spans], int), np.array([b + d for b, d in spans], int)
    lanes = packed(begin, end)
    most = max((sum(b <= t < b + d for b, d in spans) for t in range(70)), default=0)
    assert set(lanes.tolist()) == set(range(most))
    for lane in range(most):
        own = sorted((b, e) for b, e, at in zip(begin, end, lanes, strict=True) if at == lane)
        assert all(first[1] <= second[0] for first, second in pairwise(own))


_shift = st.floats(-3, 3)
_hop_times = st.tuples(st.floats(0, 5), *[st.none() | _shift] * 2, _shift)


@settings(max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.lists(
        st.tuples(st.floats(0, 9), st.floats(0, 3), st.lists(_hop_times, max_size=3), st.sampled_from("tfep")), max_size=8
    ),
    st.lists(st.booleans(), max_size=6),
)
def test_any_run_is_a_valid_trace_with_an_arrow_for_each_trained_rollout(
    groups: list[tuple[float, float, list[tuple[float, Any, Any, float]], str]], restarts: list[bool]
) -> None:
    """Clocks that differ by seconds, groups of all ends, updates that are undone and made again."""
    run = Made()
    batch: dict[int, list[int]] = defaultdict(list)
    updates = max(1, len(restarts))
    for group, (at, took, hops, kind) in enumerate(groups):
        lines = []
        for skew, began, ended, finished in hops:
            store = 1000 + at + took
            times = [("started", 1000 + at + skew), ("finished", store + finished), ("swap 1", store)]
            scoring = {"scoring_began": began and store + began, "scoring_ended": ended and store + ended}
            if began is None or ended is None:
                scoring = {"scoring_began": None, "scoring_ended": None, "scorer": None}
            lines.append({"times": times, "submitted_time": store, "scored_time": store + 0.5, **scoring})
        run.group(group, 1000 + at, *lines, purpose="eval" if kind == "e" else "train")
        if kind == "f":
            run.log.append({"kind": "settled", "time": 1000 + at + took + 0.5, "group": group, "outcome": "filtered"})
        if kind == "t":
            batch[1 + group % updates].append(group)
    clock = 1020.0
    for update in range(1, updates + 1):
        run.commit(update, clock, clock + 1.0, *batch[update], step=1.5, wait_batch=0.5, publish=0.3, checkpoint=0.1)
        if restarts and restarts[update - 1]:
            run.log.append({"kind": "fenced", "time": clock + 1.5, "incarnation": update + 1})
            run.commit(update, clock + 1.6, clock + 2.0, incarnation=update + 1)
        clock += 2.5
    _, events = run.trace()
    _check(events)
    trained = Counter((line["group"], line["rollout"]) for line in run.rollouts if line.get("trained_update"))
    slices = {(e["pid"], e["tid"], e["ts"] + e["dur"] - 1): e["args"] for e in events if e.get("cat") == "generate"}
    starts = [slices[e["pid"], e["tid"], e["ts"]] for e in events if e["ph"] == "s"]
    assert Counter((line["group"], line["rollout"]) for line in starts) == trained
    steps = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["cat"] == "learner"}
    for start, e in zip(starts, (e for e in events if e["ph"] == "f"), strict=True):
        begin, end = steps[f"update {start['trained_update']}"]
        assert begin <= e["ts"] < end
