"""What other rewards change, counted by hand; whole runs are in tests/runs/test_fork.py."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.config import AlgorithmSpec
from asyncrl.jobs.rescore import Stored, _differs, advantages_of, findings, flipped
from asyncrl.replay.state import Group, RolloutState
from asyncrl.types import Score


def group(number: int, *rewards: float | None, baseline: float | None = None) -> Group:
    """Scored rollouts of three tokens; None: invalid."""
    told = [("invalid", 0.0) if reward is None else ("ok", reward) for reward in rewards]
    rollouts = [RolloutState(row=i, length=3, status=status, reward=reward) for i, (status, reward) in enumerate(told)]
    if baseline is not None:
        rollouts.append(RolloutState(row=9, length=3, status="ok", reward=baseline))
    return Group(number, "train", number, 0, 0, 0, "gen", 1, rollouts, len(rewards), 0, 0)


def verdict(number: int, rollout: int, reward: float | None, **changes: Any) -> Score:
    status = "invalid" if reward is None else "ok"
    return Score(group=number, rollout=rollout, attempt=0, status=status, reward=reward, **changes)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo_no_std", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("remax", [0.5, -0.5, -0.5, -0.5]),
        ("reinforce_plus_plus", [1.658, -0.553, -0.553, -0.553]),  # whitened over 12 tokens, variance unbiased
    ],
)
def test_advantages_are_those_of_the_runs_own_estimator(estimator: str, expected: list[float]) -> None:
    found = advantages_of(AlgorithmSpec(adv_estimator=estimator), [group(5, 1.0, 0.0, 0.0, 0.0, baseline=0.5)])
    assert [found[5, i] for i in range(4)] == pytest.approx(expected, abs=1e-3)


def test_flips_by_hand() -> None:
    """Group 1: a wrong 1 becomes 0, so nothing is better than anything: its four advantages are gone. Group 2: a reward
    changes, and no sign. Group 3: one is no longer ok, and the others' mean moves. Group 4 is in no batch."""
    groups = {
        1: group(1, 1.0, 0.0, 0.0, 0.0),
        2: group(2, 1.0, 0.6, 0.4, 0.0),
        3: group(3, 1.0, 0.0, 0.4),
        4: group(4, 1.0, 0.0),
    }
    changed = {
        (1, 0): verdict(1, 0, 0.0),
        (2, 1): verdict(2, 1, 0.7),
        (3, 0): verdict(3, 0, None, error="no answer"),
        (4, 1): verdict(4, 1, 1.0),
    }
    commits = {1: SimpleNamespace(groups=(1, 2)), 2: SimpleNamespace(groups=(3,))}
    history: Any = SimpleNamespace(groups=groups, commits=commits)
    spec = AlgorithmSpec(adv_estimator="grpo_no_std")
    flips = flipped(spec, history, changed)
    assert flips is not None
    # Of group 3: 1.0 was above its mean, and has no advantage now; 0.4 was below the mean of 0.467, and is above that of 0.2.
    assert sorted(flips) == [(1, 0), (1, 1), (1, 2), (1, 3), (3, 0), (3, 2)]

    stored: Any = SimpleNamespace(
        changed=changed, sources={1: "a", 2: "a", 3: "b", 4: "b"}, scored=Counter({"a": 8, "b": 5}), missing=0
    )
    assert findings(history, stored, flips) == {
        "a": {"rollouts": 8, "rewards": 2, "statuses": 0, "advantages": 4},
        "b": {"rollouts": 5, "rewards": 1, "statuses": 1, "advantages": 2},
        "all": {"rollouts": 13, "rewards": 3, "statuses": 1, "advantages": 6},
    }
    assert flipped(AlgorithmSpec(adv_estimator="gae"), history, changed) is None
    assert findings(history, stored, None)["all"]["advantages"] is None


@pytest.mark.parametrize(
    ("old", "earned", "new", "differs"),
    [
        (0.5, None, verdict(1, 0, 0.5 + 1e-10), False),
        (0.5, None, verdict(1, 0, 0.5 + 1e-8), True),
        (0.5, None, verdict(1, 0, None), True),
        (0.5, [0.0, 1.0], verdict(1, 0, 0.5, token_rewards=[0.0, 1.0]), False),
        (0.5, [0.0, 1.0], verdict(1, 0, 0.5, token_rewards=[1.0, 0.0]), True),  # the sum is the same
        (0.5, [0.0, 1.0], verdict(1, 0, 0.5), True),
        (0.5, None, verdict(1, 0, 0.5, token_rewards=[0.0, 0.0]), False),
    ],
)
def test_what_is_another_verdict(old: float, earned: list[float] | None, new: Score, differs: bool) -> None:
    state = RolloutState(status="ok", reward=old)
    assert _differs(state, earned, new) == differs


def test_rollouts_are_handed_out_once_and_what_is_no_number_is_invalid(tmp_path: Path) -> None:
    history: Any = SimpleNamespace(groups={7: group(7, 0.0, 1.0)})
    stored = Stored(history)
    stored._coming = iter(range(5))  # type: ignore[assignment]
    assert [stored.lease_unscored(2, 0.0).items for _ in range(4)] == [(0, 1), (2, 3), (4,), ()]
    stored.sources[7] = "a"
    stored.score(0, [verdict(7, 0, float("nan")), verdict(7, 1, 1.0)])
    assert [(which, new.status) for which, new in stored.changed.items()] == [((7, 0), "invalid")]
    assert stored.errors.total() == 1
