"""What a run trained, read from its log alone, against what its learner was given."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncrl.config import StoreSpec
from asyncrl.errors import DataError
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log.history import RunHistory, open_history
from asyncrl.replay.store import ReplayStore
from asyncrl.types import Score, TrainRollout, Version


def same(left: list[TrainRollout], right: list[TrainRollout]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        for name in TrainRollout.__struct_fields__:
            one, other = getattr(a, name), getattr(b, name)
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, name


def make(folder: Path, fakes: SimpleNamespace, loop: Any, segment_bytes: int, keep_bytes: int = 1 << 40) -> Any:
    """Five updates of two groups, one of which has a rollout with rewards per token and one that is invalid; a learner that
    falls back to update 3, and trains on. Returns the client, and what the learner was given last for each update."""
    plan = fakes.plan(max_lag=9, batch=2)
    spec = StoreSpec(segment_bytes=segment_bytes, keep_bytes=keep_bytes)
    client = ReplayClient(loop.transport(ReplayStore(plan, folder / "replay", spec)), "all", 1)
    incarnation, given, update = client.fence(0).incarnation, {}, 0
    for until in (5, 6):
        while update < until:
            for ticket in client.reserve(2, Version(incarnation, update), [], 1.0).tickets:
                client.submit([fakes.rollout(ticket, i, Version(incarnation, update)) for i in ticket.rollouts])
                scores = [fakes.score(ticket, 0, update + ticket.group / 10)]
                scores[0] = msgspec.structs.replace(scores[0], token_rewards=[0.5, 0.0, 0.25], parts={"digits": 1.0})
                scores.append(Score(group=ticket.group, rollout=1, attempt=0, status="invalid", error="no number"))
                client.score(0, scores)
            lease = client.lease_batch(update, 1.0)
            given[update + 1] = client.rows(lease.groups)
            update += 1
            client.commit(lease.lease, Version(incarnation, update), {"loss": float(update)})
        if until == 5:
            update = 3
            incarnation = client.fence(update).incarnation
    return client, given


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_batches_are_those_that_the_learner_was_given_last(
    fakes: SimpleNamespace, tmp_path: Path, loop: Any, segment_bytes: int
) -> None:
    _, given = make(tmp_path, fakes, loop, segment_bytes)
    history = open_history(tmp_path)
    assert list(history.commits) == [1, 2, 3, 4, 5, 6]
    assert [commit.version for commit in history.commits.values()] == [
        *(Version(1, update) for update in (1, 2, 3)),
        *(Version(2, update) for update in (4, 5, 6)),
    ]
    for update, commit in history.commits.items():
        assert commit.metrics["loss"] == update
        same(history.rollouts(commit.groups), given[update])
        rows = history.rows(commit.groups, ["group", "rollout", "response"])
        assert rows["group"].to_pylist() == [group for group in commit.groups for _ in range(2)]  # the invalid one, too
        assert history.holds(commit.groups)
    assert {r.status for group in history.groups.values() for r in group.rollouts} == {"ok", "invalid"}


def test_rows_that_the_log_has_deleted_are_named(fakes: SimpleNamespace, tmp_path: Path, loop: Any) -> None:
    client, _ = make(tmp_path, fakes, loop, 1, keep_bytes=1)
    client.checkpointed(5)
    history = open_history(tmp_path)
    first, last = history.commits[1], history.commits[6]
    assert (history.holds(first.groups), history.holds(last.groups)) == (False, True)
    with pytest.raises(DataError, match=r"row 2 and 1 others of 2 are deleted: .*keep_bytes"):
        history.rollouts(first.groups)


def test_a_segment_that_is_closed_after_the_events_were_read_is_found(
    fakes: SimpleNamespace, tmp_path: Path, loop: Any
) -> None:
    make(tmp_path, fakes, loop, 1 << 20)
    history = open_history(tmp_path)
    before = history.rollouts(history.commits[6].groups)
    ReplayStore(fakes.plan(max_lag=9, batch=2), tmp_path / "replay", StoreSpec()).close()  # recovery closes the tails
    assert [path.suffix for path in (tmp_path / "replay" / "rows").iterdir()] == [".parquet"]
    same(history.rollouts(history.commits[6].groups), before)


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run directory of asyncrl"):
        open_history(tmp_path)
    (tmp_path / "replay").mkdir()
    assert RunHistory(tmp_path / "replay").commits == {}
