"""A run's log read from outside, while it is written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import asyncrl.replay
from asyncrl.config import StoreSpec
from asyncrl.errors import DataError
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log import reader
from asyncrl.replay.store import ReplayStore
from asyncrl.types import Score, Version

V = Version(1, 0)


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_rollouts_join_rows_verdicts_and_outcomes(
    fakes: SimpleNamespace, tmp_path: Path, loop: Any, segment_bytes: int
) -> None:
    plan = fakes.plan(max_lag=4, batch=1, min_valid=2)
    spec = StoreSpec(segment_bytes=segment_bytes)
    client = ReplayClient(loop.transport(ReplayStore(plan, tmp_path / "replay", spec)), "all", 1, run="demo")
    client.fence(0)
    trained, failed, pending = client.reserve(3, V, [], 1.0).tickets
    client.submit([fakes.rollout(t, i, V) for t in (trained, failed, pending) for i in t.rollouts])
    scores = [fakes.score(trained, 0, 1.0), fakes.score(trained, 1, 0.0), fakes.score(failed, 0, 1.0)]
    scores += [Score(group=failed.group, rollout=1, attempt=0, status="timeout", error="10 s")]
    scores += [Score(group=pending.group, rollout=0, attempt=0, status="ok", reward=0.5, parts={"format": 1.0})]
    client.score(0, scores)
    lease = client.lease_batch(0, 1.0)
    client.commit(lease.lease, Version(1, 1), {})
    log = asyncrl.replay.open(tmp_path)
    table = log.rollouts()
    columns = ("group", "rollout", "run", "status", "reward", "outcome", "trained_update")
    assert [tuple(row[c] for c in columns) for row in table.to_pylist()] == [
        (trained.group, 0, "demo", "ok", 1.0, "trained", 1),
        (trained.group, 1, "demo", "ok", 0.0, "trained", 1),
        (failed.group, 0, "demo", "ok", 1.0, "failed", None),
        (failed.group, 1, "demo", "timeout", None, "failed", None),
        (pending.group, 0, "demo", "ok", 0.5, None, None),
        (pending.group, 1, "demo", None, None, None, None),
    ]
    assert table["parts"].to_pylist()[4] == [("format", 1.0)]
    assert table["response_ids"].to_pylist()[0] == [5, 5, 0]
    assert log.events()["seq"].to_pylist() == list(range(log.events().num_rows))

    client.fence(0)  # the restored learner has not trained it yet
    assert log.rollouts()["outcome"].to_pylist()[:2] == [None, None]


def test_a_segment_that_is_closed_while_its_folder_is_listed_is_not_missed(
    fakes: SimpleNamespace, tmp_path: Path, loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ReplayClient(loop.transport(ReplayStore(fakes.plan(), tmp_path / "replay")), "all", 1)
    (ticket,) = client.reserve(1, Version(0, 0), [], 1.0).tickets
    client.submit([fakes.rollout(ticket, i, Version(0, 0)) for i in ticket.rollouts])
    real, missed = reader.listing, [True]

    def listing(folder: Path, stem: str) -> Any:
        """The first one passed where the segment was to be before it was there, and the tail when it was gone."""
        return ([], []) if stem == "rows" and missed and missed.pop() else real(folder, stem)

    monkeypatch.setattr(reader, "listing", listing)
    assert asyncrl.replay.open(tmp_path).rollouts().num_rows == 2


def test_a_run_that_has_just_begun_is_empty(fakes: SimpleNamespace, tmp_path: Path) -> None:
    ReplayStore(fakes.plan(), tmp_path / "replay")
    assert asyncrl.replay.open(tmp_path).rollouts().num_rows == 0


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        asyncrl.replay.open(tmp_path)


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_some_groups_and_what_is_made_of_pieces(
    fakes: SimpleNamespace, tmp_path: Path, loop: Any, segment_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StoreSpec(segment_bytes=segment_bytes)
    client = ReplayClient(loop.transport(ReplayStore(fakes.plan(max_lag=4), tmp_path / "replay", spec)), "all", 1)
    tickets = client.reserve(3, V, [], 1.0).tickets
    for t in tickets:
        client.submit([fakes.rollout(t, i, V, tokens=3 + t.group) for i in t.rollouts])
        client.score(0, [fakes.score(t, i, 1.0) for i in t.rollouts])
    log, (_, second, third) = asyncrl.replay.open(tmp_path), (t.group for t in tickets)
    opened: list[Path] = []
    real = reader.open_closed
    monkeypatch.setattr(reader, "open_closed", lambda path, *schemas: opened.append(path) or real(path, *schemas))

    def each(rows: pa.Table) -> pa.Table:
        return rows.drop_columns("logprobs").append_column("n", pc.list_value_length(rows["logprobs"]))

    table = log.rollouts(["rollout", "logprobs", "reward"], groups=[second, third], each=each)
    assert table.column_names == ["rollout", "reward", "n"]
    assert table.to_pylist() == [{"rollout": i, "reward": 1.0, "n": 3 + g} for g in (second, third) for i in (0, 1)]
    assert log.rollouts(["group"], groups=[]).num_rows == 0
    assert log.rollouts(["group"], groups=[second])["group"].to_pylist() == [second] * 2
    assert len([path for path in opened if path.parent.name == "rows"]) == (9 if segment_bytes == 1 else 0)
