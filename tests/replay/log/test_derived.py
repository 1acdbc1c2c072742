"""A new run's log made of an old one's, which is only read."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import asyncrl.replay
from asyncrl.config import StoreSpec
from asyncrl.errors import DataError
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log.derived import LogChanges, OldLog
from asyncrl.replay.store import ReplayStore
from asyncrl.types import Score, TrainRollout, Version

UPDATES = 5


def trained(client: ReplayClient, incarnation: int, update: int, ess: float = 1.0) -> list[TrainRollout]:
    """Makes the update after `update` of the batch that the store has for it."""
    lease = client.lease_batch(update, 1.0)
    rollouts = client.rows(lease.groups)
    client.commit(lease.lease, Version(incarnation, update + 1), {"gap/ess": ess})
    return rollouts


def facts(rollouts: list[TrainRollout]) -> list[tuple[Any, ...]]:
    return [(r.group, r.rollout, r.reward, r.response_ids.tolist()) for r in rollouts]


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def opened(fakes: SimpleNamespace, loop: Any) -> Callable[..., ReplayClient]:
    def open_store(folder: Path, **spec: Any) -> ReplayClient:
        store = ReplayStore(fakes.plan(max_lag=1, batch=2, size=20), folder, StoreSpec(**spec))
        return ReplayClient(loop.transport(store), "all", 1)

    return open_store


@pytest.fixture
def old(fakes: SimpleNamespace, opened: Callable[..., ReplayClient], tmp_path: Path) -> tuple[Path, list[Any], ReplayClient]:
    """Five updates of two groups, the last two made again after a restore; only the newest checkpoint is kept; a group is left
    over. The run goes on."""
    client = opened(tmp_path / "old" / "replay", segment_bytes=4000, keep_bytes=1 << 30)
    client.fence(0)
    batches = []
    for update in range(UPDATES):
        version = Version(1, update)
        for ticket in client.reserve(2, version, [], 1.0).tickets:
            client.submit([fakes.rollout(ticket, i, version, text=f"{ticket.group}/{i}") for i in ticket.rollouts])
            client.score(0, [fakes.score(ticket, i, float(ticket.group + i)) for i in ticket.rollouts])
        batches.append(facts(trained(client, 1, update)))
    client.fence(3)
    assert [facts(trained(client, 2, update)) for update in (3, 4)] == batches[3:]
    client.checkpointed(5)
    (ticket,) = client.reserve(1, Version(2, 5), [], 1.0).tickets
    client.submit([fakes.rollout(ticket, i, Version(2, 5)) for i in ticket.rollouts])
    client.score(0, [fakes.score(ticket, i, 0.5) for i in ticket.rollouts])
    return tmp_path / "old" / "replay", batches, client


def test_the_batches_after_a_checkpoint_come_again_in_their_order(
    old: tuple[Path, list[Any], ReplayClient], opened: Callable[..., ReplayClient], tmp_path: Path
) -> None:
    folder, batches, _ = old
    before, into = hashes(folder), tmp_path / "new" / "replay"
    log = OldLog(folder, 2)
    log.require_rows([5])
    log.write(into, "runs/old")
    assert hashes(folder) == before, "the old log is only read"
    linked = [path for path in (into / "rows").glob("*.parquet") if path.stat().st_nlink > 1]
    assert len(linked) == len(list((folder / "rows").glob("*.parquet"))) > 1
    earlier = {(e["group"], e["rollout"]): e["scored_time"] for e in asyncrl.replay.open(folder.parent).rollouts().to_pylist()}
    later = asyncrl.replay.open(into.parent).rollouts().to_pylist()
    assert {(e["group"], e["rollout"]): e["scored_time"] for e in later} == earlier
    assert [e["trained_update"] for e in later] == [1] * 4 + [2] * 4 + [None] * 14

    client = opened(into)
    fence = client.fence(2)
    assert (fence.incarnation, fence.committed, fence.reopened) == (3, 2, 3), "no version of the old run comes again"
    assert [facts(trained(client, 3, update, ess=0.01)) for update in (2, 3, 4)] == batches[2:]
    counts = client.report(0).counts
    assert (counts.reserved, counts.trained, counts.pending, counts.unused) == (11, 10, 1, 0)


def test_where_the_behaviour_has_drifted_the_rest_is_not_used_and_its_prompts_come_first(
    old: tuple[Path, list[Any], ReplayClient], opened: Callable[..., ReplayClient], tmp_path: Path
) -> None:
    folder, batches, _ = old
    OldLog(folder, 1).write(tmp_path / "new", "runs/old", LogChanges(min_ess=0.5))
    client = opened(tmp_path / "new")
    client.fence(1)
    assert facts(trained(client, 3, 1, ess=0.5)) == batches[1]
    ahead = client.lease_batch(2, 1.0)
    client.commit(ahead.lease, Version(3, 3), {"gap/ess": 0.49})
    counts = client.report(0).counts
    assert (counts.reserved, counts.trained, counts.unused, counts.pending) == (11, 6, 5, 0)
    assert client.lease_batch(3, 0.0).groups == ()
    again = client.reserve(2, Version(3, 3), [], 1.0).tickets
    assert [ticket.group for ticket in again] == [11, 12], "a group's number never comes again"
    assert [ticket.prompt.row for ticket in again] == [106, 107], "those of the first batch that was not trained"


def test_a_batch_that_is_leased_ahead_is_still_trained(
    old: tuple[Path, list[Any], ReplayClient], opened: Callable[..., ReplayClient], tmp_path: Path
) -> None:
    OldLog(old[0], 1).write(tmp_path / "new", "runs/old", LogChanges(min_ess=0.5))
    client = opened(tmp_path / "new")
    client.fence(1)
    first, second = client.lease_batch(1, 1.0), client.lease_batch(2, 1.0)
    client.commit(first.lease, Version(3, 2), {"gap/ess": 0.1})
    client.commit(second.lease, Version(3, 3), {"gap/ess": 0.1})
    assert client.report(0).counts.unused == 5
    client.fence(1)  # a restore brings the fork's own batches again, and nothing that was given up
    assert [client.lease_batch(update, 0.0).groups for update in (1, 2, 3)] == [first.groups, second.groups, ()]


def test_live_takes_over_no_batch(
    old: tuple[Path, list[Any], ReplayClient], opened: Callable[..., ReplayClient], tmp_path: Path
) -> None:
    OldLog(old[0], 1).write(tmp_path / "new", "runs/old", LogChanges(live=True))
    client = opened(tmp_path / "new")
    assert client.fence(1).reopened == 0
    counts = client.report(0).counts
    assert (counts.reserved, counts.trained, counts.unused) == (11, 2, 9)
    assert [t.prompt.row for t in client.reserve(2, Version(3, 1), [], 1.0).tickets] == [102, 103]


def test_new_verdicts_are_trained_and_what_is_left_over_with_one_is_not_used(
    old: tuple[Path, list[Any], ReplayClient], opened: Callable[..., ReplayClient], tmp_path: Path
) -> None:
    def score(group: int, **changes: Any) -> Score:
        return Score(group=group, rollout=0, attempt=0, status="ok", reward=-1.0, **changes)

    earned = [0.5, 0.0, 0.25]
    scores = {(6, 0): score(6, token_rewards=earned), (7, 0): score(7), (10, 0): score(10)}
    OldLog(old[0], 3).write(tmp_path / "new", "runs/old", LogChanges(scores=scores))
    client = opened(tmp_path / "new")
    client.fence(3)
    rollouts = trained(client, 3, 3)
    rewards = [r.reward for r in rollouts]
    assert [None if r.token_rewards is None else r.token_rewards.tolist() for r in rollouts] == [earned, None, None, None]
    assert rewards == [-1.0, 7.0, -1.0, 8.0]
    assert client.report(0).counts.unused == 1


def test_deleted_rows_are_named_with_what_is_left(old: tuple[Path, list[Any], ReplayClient]) -> None:
    folder, _, _ = old
    min((folder / "rows").glob("*.parquet")).unlink()
    log = OldLog(folder, 0)
    with pytest.raises(DataError, match=r"rollouts of update (\d) are deleted.*from update \1 on; checkpoints from there: 5"):
        log.require_rows([0, 5])
    OldLog(folder, 5).require_rows([0, 5])
