"""SIGKILL of each kind of actor during a run: it recovers, and the log shows that nothing was lost or trained twice."""

import os
import signal
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from asyncrl import Trainer
from asyncrl.config import CheckpointSpec, Deployment, LearnerSpec, LimitsSpec, StalenessSpec
from asyncrl.replay.log import events as ev
from asyncrl.report.summary import RunSummary

pytestmark = pytest.mark.ray
STEPS = 120


class Killer:
    """Sends a signal to actors when the run has committed so many updates: {update: actor}; then lets go of `hold`."""

    def __init__(self, plan: dict[int, str], hold: Any, what: signal.Signals = signal.SIGKILL) -> None:
        self._plan = dict(plan)
        self._hold = hold
        self._what = what
        self._victim = 0
        self.killed: list[str] = []

    def __call__(self, run: RunSummary) -> None:
        if self.killed and run.pids.get(self.killed[-1], self._victim) == self._victim:
            return  # one at a time: the last victim's successor is not up yet
        due = [update for update in sorted(self._plan) if run.committed >= update]
        if due and (name := self._plan[due[0]]) in run.pids:
            del self._plan[due[0]]
            self._victim = run.pids[name]
            os.kill(self._victim, self._what)
            self.killed.append(name)
            if not self._plan:
                self._hold.release()


def surviving_commits(events) -> list[ev.BatchCommitted]:
    """The commits that the last learner's lineage stands on, in order."""
    lineage: list[ev.BatchCommitted] = []
    for event in events:
        if isinstance(event, ev.LearnerFenced):
            lineage = [commit for commit in lineage if commit.version.update <= event.committed]
        elif isinstance(event, ev.BatchCommitted):
            lineage.append(event)
    return lineage


def run(recipe, tmp_path, killer, deployment=None):
    with Trainer(recipe, deployment, runs_dir=tmp_path, observe=killer) as trainer:
        trainer.fit()
        return trainer.finish()


def assert_nothing_lost(events, result):
    commits = surviving_commits(events)
    assert [commit.version.update for commit in commits] == list(range(1, result.steps + 1))
    trained = Counter(group for commit in commits for group in commit.groups)
    assert max(trained.values()) == 1, "a group was trained twice"
    reserved = {e.group for e in events if isinstance(e, ev.GroupReserved) and e.purpose == "train"}
    assert result.pending == 0
    assert len(reserved) == result.trained + result.filtered + result.evicted + result.failed
    assert len(trained) == result.trained


@pytest.mark.timeout(240)
def test_every_actor_is_killed_in_turn_and_the_run_recovers(local_ray, tiny_recipe, hold_after, events_of, tmp_path):
    """At max_lag = 0, where nobody can work ahead while another is gone; tests/test_remax.py kills with max_lag = 4."""
    hold = hold_after(STEPS - 30)
    killer = Killer({2: "generator-0", 10: "reward-0", 20: "store", 35: "learner"}, hold)
    recipe = tiny_recipe(
        total_steps=STEPS,
        algorithm=hold.algorithm,
        staleness=StalenessSpec(max_lag=0),
        checkpoint=CheckpointSpec(save_freq=1000),
    )
    result = run(recipe, tmp_path, killer, Deployment(limits=LimitsSpec(poll_s=0.5)))

    assert killer.killed == ["generator-0", "reward-0", "store", "learner"]
    assert result.restarts == {"generator-0": 1, "reward-0": 1, "store": 1, "learner": 1}
    assert result.steps == STEPS
    assert result.max_trained_lag == 0
    events = events_of(result.run_dir)
    assert_nothing_lost(events, result)

    fences = [e for e in events if isinstance(e, ev.LearnerFenced)]
    assert [fence.incarnation for fence in fences] == [1, 2]
    before = events[: events.index(fences[1])]
    lost = [c for c in before if isinstance(c, ev.BatchCommitted) and c.version.update > fences[1].committed]
    assert lost, "nothing was to be retrained"
    again = [c for c in surviving_commits(events) if c.version.incarnation == 2][: len(lost)]
    assert [set(c.groups) for c in again] == [set(c.groups) for c in lost], "the logged batches come first, in their order"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("actor", ["generator-0", "store"])
def test_an_actor_that_hangs_is_replaced(local_ray, tiny_recipe, hold_after, events_of, tmp_path, actor):
    hold = hold_after(20)
    killer = Killer({2: actor}, hold, signal.SIGSTOP)
    limits = LimitsSpec(poll_s=0.5, health_timeout_s=10.0)
    result = run(tiny_recipe(algorithm=hold.algorithm, total_steps=30), tmp_path, killer, Deployment(limits=limits))
    assert (killer.killed, result.restarts, result.steps) == ([actor], {actor: 1}, 30)
    assert_nothing_lost(events_of(result.run_dir), result)


@pytest.mark.timeout(200)
def test_a_stopped_run_resumes_where_it_was(local_ray, tiny_recipe, events_of, tmp_path):
    recipe = tiny_recipe(total_steps=9, learner=LearnerSpec(batch_groups=4, lr=1e-3))
    with Trainer(recipe, runs_dir=tmp_path) as first:
        assert first.fit(5).steps == 5
        checkpoint = first.save_checkpoint()
        assert checkpoint.name == "step_000005"
        first.fit(2)
    with Trainer(recipe, runs_dir=tmp_path, resume_from=tmp_path / "tiny") as second:
        assert second.fit(1).steps == 8
        second.load_checkpoint(tmp_path / "tiny" / "checkpoints" / "step_000007")
        second.fit()
        result = second.finish()
    assert (result.steps, result.samples) == (9, 9 * 4 * 4)
    events = events_of(result.run_dir)
    assert_nothing_lost(events, result)
    assert [e.committed for e in events if isinstance(e, ev.LearnerFenced)] == [0, 7, 7]
    commits = surviving_commits(events)
    assert [b.version.update - a.version.update for a, b in pairwise(commits)] == [1] * 8
    assert [c.version.incarnation for c in commits][-3:] == [1, 3, 3]
