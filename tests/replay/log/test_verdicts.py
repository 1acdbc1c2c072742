"""What events say of rollouts, joined to rows by columns, against a walk over the events one by one."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncrl.replay.log.events as ev
from asyncrl.replay.log import verdicts
from asyncrl.replay.log.verdicts import EVENT_COLUMNS, JOINED, KEYS, Verdicts, join_verdicts
from asyncrl.types import Version

Line = dict[str, Any]
_groups, _rollouts, _attempts = st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)
_keys = st.tuples(_groups, _rollouts, _attempts)
_scored = st.builds(
    lambda key, reward, said, scoring: ev.RolloutScored(
        *key, "ok" if reward else "invalid", reward, {"x": 1.0}, said, said={said: "y"}, scoring=scoring
    ),
    _keys,
    st.none() | st.floats(0.1, 1),
    st.sampled_from(["", "a"]),
    st.none() | st.just(("reward-0/1", 1.0, 2.5)),
)
_events = st.one_of(
    _groups.map(lambda g: ev.GroupReserved(g, "eval" if g == 3 else "train", g, 0, 3, 0, "gen", 1)),
    _keys.map(lambda key: ev.RolloutSubmitted(*key, 0, 0, 0, 1)),
    _scored,
    st.tuples(_groups, st.sampled_from(["filtered", "failed"])).map(lambda s: ev.GroupSettled(*s, False)),
    st.tuples(st.integers(1, 4), st.sets(_groups, max_size=2)).map(
        lambda c: ev.BatchCommitted(1, Version(1, c[0]), tuple(c[1]), {}, 0.0)
    ),
    st.integers(0, 4).map(lambda c: ev.LearnerFenced(2, c, 0.0)),
)


def _walked(events: Sequence[ev.Event]) -> dict[tuple[int, int, int], Line]:
    """The values of JOINED by key; `time` is the place of an event."""
    lines: dict[tuple[int, int, int], Line] = {}
    outcomes: dict[int, str] = {}
    trained: dict[int, int] = {}
    for time, e in enumerate(events):
        if isinstance(e, ev.RolloutSubmitted):
            lines[e.group, e.rollout, e.attempt] = dict.fromkeys(JOINED.names) | {"submitted_time": time}
        elif isinstance(e, ev.RolloutScored):
            same = {name: getattr(e, name) for name in ("status", "reward", "error")}
            maps = {"parts": list(e.parts.items()), "said": list(e.said.items()), "scored_time": time}
            scorer, began, ended = e.scoring or (None, None, None)
            scoring = {"scorer": scorer, "scoring_began": began, "scoring_ended": ended}
            lines[e.group, e.rollout, e.attempt] |= same | maps | scoring
        elif isinstance(e, ev.GroupSettled):
            outcomes[e.group] = e.outcome
        elif isinstance(e, ev.BatchCommitted):
            outcomes |= dict.fromkeys(e.groups, "trained")
            trained |= dict.fromkeys(e.groups, e.version.update)
        elif isinstance(e, ev.LearnerFenced):
            for group in [g for g, update in trained.items() if update > e.committed]:
                del trained[group], outcomes[group]
        elif isinstance(e, ev.Ended):
            reserved = {x.group for x in events if isinstance(x, ev.GroupReserved) and x.purpose == "train"}
            outcomes |= dict.fromkeys(reserved - outcomes.keys(), "unused")
    for (group, _, _), line in lines.items():
        line |= {"outcome": outcomes.get(group), "trained_update": trained.get(group)}
    return lines


def _possible(events: Sequence[ev.Event]) -> list[ev.Event]:
    """Without verdicts on what is not there, and without second submissions."""
    seen: set[tuple[int, int, int]] = set()
    found = []
    for e in events:
        key = (e.group, e.rollout, e.attempt) if isinstance(e, ev.RolloutSubmitted | ev.RolloutScored) else None
        if key is None or (key in seen) == isinstance(e, ev.RolloutScored):
            found.append(e)
            seen |= {key} if key else set()
    return found


def _pieces(events: Sequence[ev.Event], cut: int, groups: Sequence[int] | None = None) -> list[Verdicts]:
    tables = [pa.Table.from_batches([ev.to_batch([e], at, float(at))]) for at, e in enumerate(events)]
    whole = pa.concat_tables([ev.EVENTS.empty_table(), *tables]).select(EVENT_COLUMNS)
    return [Verdicts(piece, JOINED.names, groups) for piece in (whole.slice(0, cut), whole.slice(cut))]


def _rows(keys: Sequence[tuple[int, int, int]]) -> pa.Table:
    types = zip(KEYS, (pa.int64(), pa.int32(), pa.int32()), strict=True)
    columns = {name: pa.array([key[i] for key in keys], kind) for i, (name, kind) in enumerate(types)}
    return pa.table(columns | {"at": pa.array(range(len(keys)), pa.int64())})


@pytest.mark.parametrize("joined_bytes", [0, 1 << 30])
@given(st.lists(_events, max_size=30), st.booleans(), st.integers(0, 30), st.lists(_keys, max_size=12))
def test_lines_are_those_of_a_walk_over_the_events(
    joined_bytes: int, events: list[ev.Event], ended: bool, cut: int, keys: list[tuple[int, int, int]]
) -> None:
    events = [*_possible(events), *([ev.Ended()] if ended else [])]
    known, last = _walked(events), {key: at for at, key in enumerate(keys)}
    expected = [{"at": at} | known[key] for at, key in enumerate(keys) if key in known and last[key] == at]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "_JOINED_BYTES", joined_bytes)  # 0: as where all texts have more than 2 GiB
        table = join_verdicts(_rows(keys), _pieces(events, cut))
    assert table.select(["at", *JOINED.names]).to_pylist() == expected
    assert [table.schema.field(f.name).type for f in JOINED] == JOINED.types

    of_two = join_verdicts(_rows([key for key in keys if key[0] < 2]), _pieces(events, cut, [0, 1]))
    assert of_two.drop_columns("at").to_pylist() == [
        dict(zip(KEYS, keys[line["at"]], strict=True)) | {k: v for k, v in line.items() if k != "at"}
        for line in expected
        if keys[line["at"]][0] < 2
    ]
