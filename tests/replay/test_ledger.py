"""What events come to, where whole schedules seldom go."""

import asyncrl.replay.log.events as ev
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.state import RolloutState
from asyncrl.types import Version


def generated(ledger: Ledger, group: int, *, baseline: str = "") -> None:
    ledger.apply(ev.GroupReserved(group, "train", group, 0, 1, 0, "generator-0", 1, baseline=bool(baseline)))
    for rollout, status in enumerate(["ok", *([baseline] if baseline else [])]):
        ledger.apply(ev.RolloutSubmitted(group, rollout, 0, 2 * group + rollout, 0, 0, 4))
        ledger.apply(ev.RolloutScored(group, rollout, 0, status, 1.0 if status == "ok" else None))


def trained(ledger: Ledger, update: int, *groups: int, replayed: bool = False) -> None:
    ledger.apply(ev.BatchLeased(update, update - 1, groups, replayed))
    ledger.apply(ev.BatchCommitted(update, Version(ledger.incarnation, update), groups, {}, 0.0))


def test_a_fork_that_leaves_the_old_log_keeps_its_own_groups_of_a_reopened_batch() -> None:
    """Its learner trained a batch of the old log's groups (0, 1), then one of both runs' (2 of the old one, 3); it fell back,
    and leaves the old log at the first of these."""
    ledger = Ledger(max_lag=4)
    for group in (0, 1, 2):
        generated(ledger, group)
    ledger.apply(ev.LogForked("runs/old", 0, 1, ((0, 1),), 0.5))
    ledger.apply(ev.LearnerFenced(2, 0, 0.0))
    trained(ledger, 1, 0, 1, replayed=True)
    generated(ledger, 3)
    trained(ledger, 2, 2, 3)
    ledger.apply(ev.LearnerFenced(3, 0, 0.0))
    assert ledger.reopened == {0: (0, 1), 1: (2, 3)}
    ledger.apply(ev.BatchLeased(3, 0, (0, 1), True))
    ledger.apply(ev.BatchCommitted(3, Version(3, 1), (0, 1), {}, 0.0))
    ledger.apply(ev.GroupsUnused((2,)))
    assert (ledger.reopened, ledger.taken, ledger.ready, list(ledger.groups)) == ({}, set(), {3}, [3])
    counts = ledger.counts()
    assert (counts.reserved, counts.trained, counts.unused, counts.pending) == (4, 2, 1, 1)


def test_a_group_whose_baseline_has_failed_has_nothing_to_train() -> None:
    ledger = Ledger(max_lag=4)
    for group, status in enumerate(("ok", "timeout", "invalid")):
        generated(ledger, group, baseline=status)
    assert [len(ledger.groups[group].ok()) for group in range(3)] == [1, 0, 0]
    waits = ledger.groups[0]
    waits.rollouts[1] = RolloutState()
    assert len(waits.ok()) == 1, "its baseline may still come"
