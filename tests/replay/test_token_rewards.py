"""What single tokens earned: written beside their rollout, read back to the bit, by whoever opens the log."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.config import StoreSpec
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log import rows as schema
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.replay.store import ReplayStore
from asyncrl.types import TrainRollout, Version

V = Version(1, 0)
EARNED = [1 / 3, 0.0, -1e-17]


def opened(fakes: SimpleNamespace, loop: Any, folder: Path, segment_bytes: int = 1 << 20) -> tuple[ReplayStore, ReplayClient]:
    plan = fakes.plan(max_lag=4, batch=1, n=2, min_valid=1, baseline=True)
    store = ReplayStore(plan, folder, StoreSpec(segment_bytes=segment_bytes))
    return store, ReplayClient(loop.transport(store), "all", 1)


def plain(rollouts: list[TrainRollout]) -> list[Any]:
    return [(r.rollout, r.reward, r.baseline, None if r.token_rewards is None else r.token_rewards.tolist()) for r in rollouts]


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_token_rewards_reach_the_learner_and_survive_a_restart(
    fakes: SimpleNamespace, tmp_path: Path, loop: Any, segment_bytes: int
) -> None:
    store, client = opened(fakes, loop, tmp_path, segment_bytes)
    client.fence(0)
    (a,) = client.reserve(1, V, [], 1.0).tickets
    client.submit([fakes.rollout(a, i, V) for i in a.rollouts])
    first = fakes.score(a, 0, 1.0, EARNED)
    client.score(0, [first, fakes.score(a, 2, 0.5, [0.25, 0.0, 0.25])])
    client.score(0, [fakes.score(a, 0, 9.0, [9.0] * 3), fakes.score(a, 1, 0.0)])  # the first verdict on 0 stands
    lease = client.lease_batch(0, 1.0)
    expected = [(0, 1.0, 1.0, EARNED), (1, 0.0, 1.0, None)]
    assert plain(client.rows(lease.groups)) == expected

    lines = ReplayReader(tmp_path).rollouts()
    lines = lines.sort_by("rollout")
    assert lines["rollout"].to_pylist() == [0, 1, 2]  # one line each, though two rows of 0 and 2 are in the log
    assert lines["baseline"].to_pylist() == [False, False, True]
    assert lines["token_rewards"].to_pylist() == [EARNED, None, [0.25, 0.0, 0.25]]
    assert lines["reward"].to_pylist() == [1.0, 0.0, 0.5]

    client.commit(lease.lease, Version(1, 1), {})
    store._folder.close()  # as a kill would
    _, client = opened(fakes, loop, tmp_path, segment_bytes)
    client.fence(0)
    again = client.lease_batch(0, 1.0)
    assert again.replayed
    assert plain(client.rows(again.groups)) == expected


def test_rows_written_by_a_call_that_was_killed_do_not_count(fakes: SimpleNamespace, tmp_path: Path, loop: Any) -> None:
    store, client = opened(fakes, loop, tmp_path)
    client.fence(0)
    (a,) = client.reserve(1, V, [], 1.0).tickets
    client.submit([fakes.rollout(a, i, V) for i in a.rollouts])
    rows = store._log.take([0], schema.ROWS.names)
    store._log.append_rows(schema.with_token_rewards(rows, [[5.0] * 3]))  # and its event never came
    store._folder.close()
    store, client = opened(fakes, loop, tmp_path)
    assert store._log._rows.rows == 3
    client.score(0, [fakes.score(a, 0, 1.0, EARNED), fakes.score(a, 1, 0.0), fakes.score(a, 2, 0.0)])
    client.fence(0)
    assert plain(client.rows(client.lease_batch(0, 1.0).groups)) == [(0, 1.0, 0.0, EARNED), (1, 0.0, 0.0, None)]


@pytest.mark.parametrize(
    ("earned", "words"),
    [
        ([0.0], "1 token_rewards for 3 response tokens: one per token is expected"),
        ([0.0, float("nan"), 0.0], "token_rewards or their sum are not finite"),
        ([1e308, 1e308, 1e308], "token_rewards or their sum are not finite"),
    ],
)
def test_wrong_token_rewards_make_their_rollout_invalid(
    fakes: SimpleNamespace, tmp_path: Path, loop: Any, earned: list[float], words: str
) -> None:
    _, client = opened(fakes, loop, tmp_path)
    (a,) = client.reserve(1, V, [], 1.0).tickets
    client.submit([fakes.rollout(a, i, V) for i in a.rollouts])
    client.score(0, [fakes.score(a, 0, 1.0, earned)])
    line = ReplayReader(tmp_path).rollouts().to_pylist()[0]
    assert (line["status"], line["reward"], line["error"], line["token_rewards"]) == ("invalid", None, words, None)


def test_dynamic_sampling_sees_what_a_rollout_earned_in_all(fakes: SimpleNamespace) -> None:
    seen: list[list[float]] = []
    bench = fakes.Bench(fakes.plan(n=2, keep=lambda rewards: seen.append(list(rewards)) is not None))
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0, 0)
    bench.scored(0, [fakes.score(a, 0, 1.0, [0.5, -2.0]), fakes.score(a, 1, 1.0)], bench.rows)
    assert seen == [[-0.5, 1.0]]
