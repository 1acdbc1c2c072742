"""What is known of rollouts, and how they are picked."""

import json
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.report import samples
from asyncrl.report.samples import (
    DETAILS,
    SCALARS_AND_TOKENS,
    Message,
    TokenSpan,
    by_group,
    chosen,
    compared,
    groups_of,
    ranked,
    samples_of,
    summed,
)

_TYPES = {
    "group": pa.int64(), "rollout": pa.int32(), "attempt": pa.int32(), "baseline": pa.bool_(), "oldest": pa.int32(),
    "span_lengths": pa.list_(pa.int32()), "token_rewards": pa.list_(pa.float64()), "reward": pa.float64(),
    "trained_update": pa.int64(), "loss_mask": pa.list_(pa.int8()), "logprobs": pa.list_(pa.float32()), "status": pa.string(),
    "data_source": pa.string(), "purpose": pa.string(), "parts": pa.map_(pa.string(), pa.float64()), "error": pa.string(),
    "said": pa.map_(pa.string(), pa.string()), "times": pa.map_(pa.string(), pa.float64()),
}  # fmt: skip
_USUAL: dict[str, Any] = {
    "attempt": 0, "baseline": False, "purpose": "train", "data_source": "sums", "oldest": 3, "span_lengths": [2, 1],
    "span_updates": [3, 4], "token_rewards": None, "status": "ok", "reward": 1.0, "outcome": "trained", "trained_update": 6,
    "loss_mask": [1, 0, 1], "logprobs": [-0.5, 0.0, -1.0], "row": 7, "ground_truth": "4", "prompt": "2+2=", "response": "5",
    "response_ids": [8, 9, 0], "turns": [0], "segments": None, "episode": None, "finish_reason": "stop",
    "worker": "generator-0", "times": [("reserved", 1.0)], "parts": [("format", 0.5)], "error": "", "said": [],
}  # fmt: skip


def _rows(*changes: dict[str, Any]) -> pa.Table:
    rows = [_USUAL | {"group": 0, "rollout": at} | change for at, change in enumerate(changes)]
    return pa.table({n: pa.array([row[n] for row in rows], _TYPES.get(n)) for n in DETAILS})


def _lines(*changes: dict[str, Any]) -> pa.Table:
    return compared(summed(_rows(*changes).select(SCALARS_AND_TOKENS)))


def test_figures_of_lines_by_hand() -> None:
    lines = _lines(
        {"reward": 1.0},
        {"reward": 0.0, "token_rewards": [0.25, 0.0, 0.25]},  # counts as 0.5
        {"reward": None, "status": "timeout"},
        {"reward": 9.0, "baseline": True, "outcome": None, "trained_update": None},
        {"reward": 5.0, "group": 1, "loss_mask": [0, 0, 0]},
        {"reward": 5.0, "group": 2, "span_lengths": [], "loss_mask": [], "logprobs": [], "oldest": None},
    )
    assert lines["length"].to_pylist() == [3, 3, 3, 3, 3, 0]
    assert lines["token_sum"].to_pylist() == [0.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert lines["gain"].to_pylist() == [0.25, -0.25, None, None, None, None]  # mean 0.75; alone there is nothing to compare
    assert lines["surprise"].to_pylist() == [0.75, 0.75, 0.75, 0.75, None, None]  # (0.5 + 1.0) / 2
    assert lines["lag"].to_pylist() == [2, 2, 2, None, 2, None]  # trained as update 6 by the weights of 5


@given(st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(-3, 3)), max_size=40))
def test_gains_of_a_group_add_up_to_nothing(drawn: list[tuple[int, int | None]]) -> None:
    changes = [{"group": g, "reward": None if r is None else float(r)} for g, r in drawn]
    gains = list(zip((g for g, _ in drawn), _lines(*changes)["gain"].to_pylist(), strict=True))
    for group in {g for g, _ in drawn}:
        own = [gain for g, gain in gains if g == group and gain is not None]
        rewards = [r for g, r in drawn if g == group and r is not None]
        assert len(own) == (len(rewards) if len(rewards) > 1 else 0)
        assert math.fsum(own) == pytest.approx(0.0, abs=1e-9)
        if own:
            assert max(own) - min(own) == pytest.approx(max(rewards) - min(rewards))


@given(st.lists(st.none() | st.integers(0, 3), max_size=12), st.integers(0, 15), st.integers(0, 15))
def test_the_worst_and_the_best_are_the_ends_of_the_sorted(rewards: list[int | None], worst: int, best: int) -> None:
    lines = _lines(*({"reward": None if r is None else float(r)} for r in rewards))
    picked = ranked(lines, worst=worst, best=best)
    known = sorted((r, at) for at, r in enumerate(rewards) if r is not None)
    ends = [*known[:worst], *known[::-1][: min(best, max(0, len(known) - worst))]]
    if worst or best:
        assert [(r, at) for r, at in zip(*(picked[n].to_pylist() for n in ("reward", "rollout")), strict=True)] == ends
    else:
        assert picked["rollout"].to_pylist() == list(range(len(rewards)))
    whole = ranked(lines, by="reward")["rollout"].to_pylist()
    assert whole[: len(known)] == [at for _, at in known[::-1]]
    assert sorted(whole) == list(range(len(rewards)))


@pytest.mark.parametrize(
    ("wanted", "rollouts"),
    [
        ({}, [0, 1, 2]),
        ({"update": 6}, [0, 2]),
        ({"group": 0}, [0, 1]),
        ({"status": "invalid"}, [1]),
        ({"source": "sums", "update": 6}, [0]),
        ({"purpose": "eval"}, [3]),
        ({"purpose": None}, [0, 1, 2, 3]),
        ({"group": 9}, []),
    ],
)
def test_choosing(wanted: dict[str, Any], rollouts: list[int]) -> None:
    lines = _lines(
        {},
        {"status": "invalid", "reward": None, "trained_update": 7},
        {"group": 1, "data_source": "words"},
        {"group": 2, "purpose": "eval", "trained_update": None},
    )
    assert chosen(lines, **wanted)["rollout"].to_pylist() == rollouts


def test_samples_are_described_whole_and_in_the_order_of_the_lines() -> None:
    said = [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]
    rows = _rows(
        {"group": 1, "reward": 0.0},
        {"group": 0, "reward": 1.0},
        {
            "group": 1,
            "reward": 0.5,
            "episode": json.dumps({"messages": json.dumps(said), "reward": 0.5}),
            "said": [("j", "no")],
        },
    )
    lines = ranked(compared(summed(rows)), by="reward", worst=3)
    assert groups_of(lines) == [1, 0]
    found = samples_of(rows, lines)
    assert [(s.name, s.reward, s.gain) for s in found] == [("1/0/0", 0.0, -0.25), ("1/2/0", 0.5, 0.25), ("0/1/0", 1.0, None)]
    assert [[s.rollout for s in group] for group in by_group(found)] == [[0, 2], [1]]
    first, episode, _ = found
    assert (first.length, first.lag, first.surprise, first.parts, first.times) == (
        3,
        2,
        0.75,
        {"format": 0.5},
        {"reserved": 1.0},
    )
    assert first.spans == (TokenSpan(0, 2, 3), TokenSpan(2, 3, 4))
    assert (first.token_ids, first.chosen, first.logprobs) == ((8, 9, 0), (True, False, True), (-0.5, 0.0, -1.0))
    assert first.messages == ()
    assert episode.messages == (Message("user", "2+2=?"), Message("assistant", '{"tool_calls":[{"id":"1"}]}'))
    assert episode.said == {"j": "no"}
    assert [s.name for s in samples_of(rows)] == ["1/0/0", "0/1/0", "1/2/0"]


def test_lists_in_several_chunks_are_one_column() -> None:
    rows = _rows({"reward": 1.0}, {"reward": 0.0})
    in_chunks = pa.concat_tables([rows.slice(1), rows.slice(0, 1), rows.slice(0, 0)])
    assert samples.summed(in_chunks)["surprise"].to_pylist() == [0.75, 0.75]
    assert samples_of(in_chunks)[0].reward == 0.0
