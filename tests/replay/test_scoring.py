from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from asyncrl.replay.plan import GROUP_FILTERS
from asyncrl.types import Score


def test_rollouts_are_scored_in_the_order_they_came(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan())
    a, b = bench.reserve(2, 0).tickets
    bench.submit(b, 0)
    bench.submit(a, 0, rollouts=[1])
    assert bench.lease_unscored(2, "r", 1)[1] == [0, 1]
    assert bench.lease_unscored(9, "r", 1)[1] == [2]
    assert bench.lease_unscored(9, "r", 1) == (0, [])


def test_an_expired_lease_is_handed_out_again_unless_extended(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(lease_s=10))
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0)
    dead, _ = bench.lease_unscored(1, "dead", 1)
    slow, _ = bench.lease_unscored(1, "slow", 1)
    bench.sleep(9)
    bench.extend(slow, "slow")
    bench.extend(dead, "somebody else")
    bench.sleep(2)
    assert bench.lease_unscored(9, "new", 1)[1] == [0]
    bench.scored(dead, [fakes.score(a, 0, 1.0)])  # late, but first
    bench.scored(3, [fakes.score(a, 0, 0.0)])
    bench.scored(slow, [fakes.score(a, 1, 0.5)])
    assert [r.reward for r in bench.core.ledger.groups[a.group].rollouts] == [1.0, 0.5]
    assert bench.state()["depths"]["scoring"] == 0


def test_what_a_dead_worker_held_goes_to_its_successor_at_once(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan())
    a, b = bench.reserve(2, 0).tickets
    bench.submit(a, 0)
    bench.submit(b, 0)
    other, _ = bench.lease_unscored(1, "other", 1)
    dead, _ = bench.lease_unscored(2, "r", 1)
    bench.core.context.stirred.clear()
    heir, found = bench.lease_unscored(1, "r", 2)
    assert found == [1]  # the oldest of the two; `other` keeps its own
    assert "unscored" in bench.core.context.stirred, "those who wait hear of what is left of it"
    assert bench.lease_unscored(9, "other", 1)[1] == [2, 3]
    assert bench.lease_unscored(9, "r", 2) == (0, []), "its own work was taken from it"
    bench.extend(dead, "r")
    assert {other, heir} < bench.state()["reward_leases"].keys()
    assert dead not in bench.state()["reward_leases"]


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_ok_without_a_number_is_invalid_never_zero(fakes: SimpleNamespace, reward: float | None) -> None:
    bench = fakes.Bench(fakes.plan(min_valid=2))
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0)
    bench.scored(0, [Score(group=a.group, rollout=i, attempt=0, status="ok", reward=r) for i, r in ((0, 1.0), (1, reward))])
    assert bench.core.ledger.counts().failed == 1
    assert "is not a number" in bench.log[-2].error


def test_an_aborted_rollout_counts_as_invalid(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan(min_valid=2))
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0, problem="finish_reason=abort")
    assert bench.lease_unscored(9, "r", 1) == (0, [])
    assert bench.core.ledger.counts().failed == 1


def test_verdicts_on_unknown_rollouts_change_nothing(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan())
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0, rollouts=[0])
    before = len(bench.log)
    bench.scored(
        9,
        [
            Score(group=g, rollout=r, attempt=t, status="ok", reward=1.0)
            for g, r, t in ((0, 1, 0), (0, 0, 7), (5, 0, 0), (0, 9, 0))
        ],
    )
    assert len(bench.log) == before


def test_the_queue_is_rebuilt_after_a_restart(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(fakes.plan())
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0)
    bench.scored(0, [fakes.score(a, 0, 1.0)])
    bench.core = bench.build()
    assert bench.lease_unscored(9, "r", 1)[1] == [1]


def test_keep_functions_by_name() -> None:
    assert GROUP_FILTERS["all"]([1.0, 1.0])
    assert GROUP_FILTERS["varied"]([1.0, 0.0])
    assert not GROUP_FILTERS["varied"]([1.0, 1.0])


def test_a_group_that_is_compared_is_leased_whole_once_it_is_complete(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(replace(fakes.plan(n=3), whole_groups=True))
    a, b = bench.reserve(2, 0).tickets
    bench.submit(a, 0, rollouts=[0, 2])
    bench.submit(b, 0)
    assert bench.lease_unscored(1, "r", 1)[1] == [2, 3, 4], "b's three, more than asked for; a is not complete"
    assert bench.lease_unscored(9, "r", 1) == (0, [])
    bench.submit(a, 0, rollouts=[1])
    lease, rows = bench.lease_unscored(1, "r", 1)
    assert sorted(rows) == [0, 1, 5]
    bench.scored(lease, [fakes.score(a, i, 1.0) for i in range(3)])
    assert bench.lease_unscored(9, "r", 1) == (0, [])


def test_a_groups_last_rollout_that_is_of_no_use_lets_the_others_be_scored(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(replace(fakes.plan(n=3, min_valid=2), whole_groups=True))
    (a,) = bench.reserve(1, 0).tickets
    bench.submit(a, 0, rollouts=[0, 1])
    bench.submit(a, 0, rollouts=[2], problem="finish_reason=abort")
    assert sorted(bench.lease_unscored(1, "r", 1)[1]) == [0, 1]
