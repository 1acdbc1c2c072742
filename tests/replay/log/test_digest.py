"""What the log says of a run, in arrays."""

from pathlib import Path

import numpy as np
import pyarrow as pa

import asyncrl.replay.log.events as ev
from asyncrl.config import StoreSpec
from asyncrl.replay.log.digest import digest_events, rollout_keys
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.types import Version


def submitted(group: int, rollout: int, attempt: int = 0) -> ev.RolloutSubmitted:
    return ev.RolloutSubmitted(group, rollout, attempt, row=0, oldest=0, newest=0, length=3)


def committed(update: int, *groups: int, incarnation: int = 1) -> ev.BatchCommitted:
    return ev.BatchCommitted(update, Version(incarnation, update), groups, {}, time=100.0 + update)


def keys(*rollouts: tuple[int, int, int]) -> np.ndarray:
    return rollout_keys(pa.table(dict(zip(("group", "rollout", "attempt"), zip(*rollouts, strict=True), strict=True))))


def test_the_surviving_lineage(tmp_path: Path) -> None:
    """Update 2 is undone and made again with another group; what came before stays."""
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))  # a segment a call
    log.append_events([ev.LearnerFenced(1, 0, 1.0), submitted(5, 0), submitted(5, 1)])
    log.append_events([committed(1, 5), submitted(7, 0), committed(2, 6)])
    log.append_events([submitted(7, 1, attempt=1)])
    log.append_events([ev.LearnerFenced(2, 1, 2.0), submitted(8, 0), committed(2, 7, incarnation=2), submitted(9, 0)])
    log.append_events([ev.HolderDied("generator-0", 1, (8, 9)), ev.Ended()])
    log.close()
    found = digest_events(ReplayReader(tmp_path))
    assert {update: (made.time, made.groups) for update, made in found.updates.items()} == {1: (101.0, (5,)), 2: (102.0, (7,))}
    assert found.updates_of(np.array([5, 6, 7, 8])).tolist() == [1, -1, 2, -1]
    rollouts = keys((5, 0, 0), (5, 1, 0), (7, 0, 0), (7, 1, 1), (8, 0, 0), (9, 0, 0), (7, 1, 0), (4, 0, 0))
    assert found.made_before(rollouts).tolist() == [0, 0, 1, 2, 1, 2, -1, -1]
    assert [type(event) for _, event in found.restarts] == [ev.LearnerFenced, ev.HolderDied]  # the first start is none
    assert found.over


def test_rewards_and_what_was_lost(tmp_path: Path) -> None:
    log = ReplayLog(tmp_path)
    scores = [(3, 0, "ok", 1.0), (3, 1, "ok", 0.25), (4, 0, "invalid", None), (4, 1, "timeout", None), (2, 0, "invalid", None)]
    log.append_events([ev.RolloutScored(group, rollout, 0, status, reward) for group, rollout, status, reward in scores])
    log.append_events([ev.GroupSettled(4, "evicted", True), ev.GroupSettled(2, "failed", False)])
    found = digest_events(ReplayReader(tmp_path))
    assert found.scored_groups.tolist() == [3, 3]
    assert found.scored_rollouts.tolist() == [0, 1]
    assert found.rewards.tolist() == [1.0, 0.25]
    assert found.bad_groups.tolist() == [2, 4]
    lost = {name: len(times) for name, times in found.lost.items()}
    assert lost == {"evicted": 1, "failed": 1, "filtered": 0, "invalid": 2, "timeout": 1}
    assert not found.over
    log.append_events([ev.Ended()])
    assert digest_events(ReplayReader(tmp_path)).over
    log.append_events([ev.LearnerFenced(2, 0, 5.0)])  # it goes on
    assert not digest_events(ReplayReader(tmp_path)).over
    log.close()


def test_an_empty_log(tmp_path: Path) -> None:
    ReplayLog(tmp_path).close()
    found = digest_events(ReplayReader(tmp_path))
    assert (found.began, found.updates, found.updates_of(np.array([1])).tolist()) == (0.0, {}, [-1])
