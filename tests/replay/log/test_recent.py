"""Rollouts of the newest updates, followed while a store writes its log, against the whole log read at once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from asyncrl.config import StoreSpec
from asyncrl.replay import open as open_replay
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log import recent
from asyncrl.replay.log.recent import RecentRollouts
from asyncrl.replay.store import ReplayStore
from asyncrl.types import Score, Version

COLUMNS = ["response", "reward", "parts", "status", "error", "outcome", "token_rewards", "scored_time", "span_updates"]


class Run:
    """A store and all of its workers: two groups of two rollouts an update, one of them invalid."""

    def __init__(self, folder: Path, fakes: SimpleNamespace, loop: Any, segment_bytes: int) -> None:
        self.folder, self._fakes = folder, fakes
        self.store = ReplayStore(fakes.plan(max_lag=9, batch=2), folder / "replay", StoreSpec(segment_bytes=segment_bytes))
        self._client = ReplayClient(loop.transport(self.store), "all", 1)
        self.incarnation = self._client.fence(0).incarnation
        self.update = 0

    def train(self) -> None:
        version = Version(self.incarnation, self.update)
        for ticket in self._client.reserve(2, version, [], 1.0).tickets:
            texts = [f"{ticket.group} of {version}" for _ in ticket.rollouts]
            self._client.submit([self._fakes.rollout(ticket, i, version, text=texts[i]) for i in ticket.rollouts])
            scores = [self._fakes.score(ticket, 0, ticket.group / 10, [0.5, 0.0, 0.25])]
            scores.append(Score(group=ticket.group, rollout=1, attempt=0, status="invalid", error="no number"))
            self._client.score(0, scores)
        lease = self._client.lease_batch(self.update, 1.0)
        self._client.rows(lease.groups)
        self.update += 1
        self._client.commit(lease.lease, Version(self.incarnation, self.update), {})

    def restore(self, update: int) -> None:
        self.incarnation, self.update = self._client.fence(update).incarnation, update

    def expected(self, first: int) -> list[dict[str, Any]]:
        whole = open_replay(self.folder).rollouts(["group", "rollout", "attempt", "trained_update", *COLUMNS])
        return rows(whole.filter(pc.greater_equal(whole["trained_update"], first)))


def rows(table: pa.Table) -> list[dict[str, Any]]:
    return table.sort_by([("trained_update", "ascending"), ("group", "ascending"), ("rollout", "ascending")]).to_pylist()


@pytest.fixture(params=[6000, 1 << 20])  # bytes of a segment: of some calls, of all
def run(request: pytest.FixtureRequest, fakes: SimpleNamespace, tmp_path: Path, loop: Any) -> Run:
    return Run(tmp_path, fakes, loop, request.param)


def test_what_is_followed_is_what_the_whole_log_says(run: Run) -> None:
    following = RecentRollouts(run.folder / "replay", COLUMNS, 3)
    assert following.table(0).num_rows == 0
    for update in range(1, 9):
        run.train()
        if update % 3 != 1:  # some looks come late
            assert rows(following.table(update)) == run.expected(max(1, update - 2))
            assert following.table(update).num_rows == 4 * min(update, 3)
    assert rows(following.table(7)) == [row for row in run.expected(6) if row["trained_update"] <= 7]
    run.restore(5)  # updates 6 to 8 are to be trained again, from the same groups
    assert {row["trained_update"] for row in rows(following.table(5))} <= {5}
    for _ in range(4):
        run.train()
    assert rows(following.table(9)) == run.expected(7)


def test_a_follower_that_comes_later_begins_with_the_newest_closed_segment(run: Run) -> None:
    for _ in range(8):
        run.train()
    table = RecentRollouts(run.folder / "replay", COLUMNS, 20).table(8)
    closed = list((run.folder / "replay/events").glob("*.parquet"))
    first = pc.min(table["trained_update"]).as_py()
    assert first > 1 if closed else first == 1
    assert rows(table) == run.expected(first), "of an update that is known, all rollouts"


def test_groups_of_an_update_that_was_undone_before_are_found(run: Run) -> None:
    """As of a run that is resumed: its follower begins with the log's end."""
    for _ in range(6):
        run.train()
    run.restore(2)
    following = RecentRollouts(run.folder / "replay", COLUMNS, 3)
    following.table(2)
    for update in range(3, 9):
        run.train()
        found = [row for row in rows(following.table(update)) if row["trained_update"] >= 3]
        assert found == run.expected(max(3, update - 2))


def test_age_counts_from_the_update_that_is_asked_for(run: Run) -> None:
    following = RecentRollouts(run.folder / "replay", ["age"], None)
    for _ in range(3):
        run.train()
        following.table(run.update)
    ages = following.table(3).group_by("age").aggregate([("group", "count")]).sort_by("age").to_pylist()
    assert ages == [{"age": age, "group_count": 4} for age in range(3)]
    assert set(zip(*following.table(2).select(["trained_update", "age"]).to_pydict().values(), strict=True)) == {(1, 1), (2, 0)}


def test_what_is_held_is_bounded(fakes: SimpleNamespace, tmp_path: Path, loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, fakes, loop, 1 << 20)
    monkeypatch.setattr(recent, "HELD_BYTES", 1)
    following = RecentRollouts(run.folder / "replay", ["response"], None)
    for _ in range(4):
        run.train()
        following.table(run.update)
    assert set(following.table(4)["trained_update"].to_pylist()) == {4}
    assert (following._rows.num_rows, following._events.num_rows) == (0, 0)  # nothing is kept of groups that ended
