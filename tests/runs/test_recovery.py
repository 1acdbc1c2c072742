"""Actors are killed, hang, or are stopped: the run recovers or resumes; its log shows nothing lost or trained twice."""

import logging
import os
import re
import signal
from collections.abc import Container
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl import Recipe, RunResult, Trainer, launch
from asyncrl.config import CheckpointSpec, Deployment, LearnerSpec, LimitsSpec, RanksSpec, StalenessSpec
from asyncrl.errors import ConfigError, DataError
from asyncrl.replay.log import events as ev
from asyncrl.replay.log.tail import record
from asyncrl.report.summary import RunSummary
from asyncrl.types import Version

pytestmark = pytest.mark.ray
STEPS = 80


class Killer:
    """Kills actors when the run has committed so many updates: {update: actor}; then lets go of `hold`. hangs: the updates at
    which the actor is stopped instead."""

    def __init__(self, plan: dict[int, str], hold: Any, hangs: Container[int] = ()) -> None:
        self._plan = dict(plan)
        self._hold = hold
        self._hangs = hangs
        self._victim = 0
        self.killed: list[str] = []

    def __call__(self, run: RunSummary) -> None:
        if self.killed and run.pids.get(self.killed[-1], self._victim) == self._victim:
            return  # one at a time: the last victim's successor is not up yet
        due = [update for update in sorted(self._plan) if run.committed >= update]
        if due and (name := self._plan[due[0]]) in run.pids:
            del self._plan[due[0]]
            self._victim = run.pids[name]
            os.kill(self._victim, signal.SIGSTOP if due[0] in self._hangs else signal.SIGKILL)
            self.killed.append(name)
            if not self._plan:
                self._hold.release()


def unsealed(events: Path) -> Path:
    """The newest closed segment of the events as the tail that it was, a record per call; as if the run had been killed."""
    (notes,), closed = events.glob("*.tail"), max(events.glob("*.parquet"))
    table = pq.read_table(closed)
    ends = [i for i, (a, b) in enumerate(pairwise([*table["time"].to_pylist(), None]), 1) if a != b]
    calls = [table.slice(begin, end - begin).combine_chunks().to_batches() for begin, end in pairwise([0, *ends])]
    tail = events / f"_{closed.stem}.tail"
    notes.unlink()
    closed.unlink()
    tail.write_bytes(b"".join(map(record, [ev.EVENTS.serialize(), *(call.serialize() for (call,) in calls)])))
    return tail


def run(recipe, tmp_path, killer, deployment=None):
    with Trainer(recipe, deployment, runs_dir=tmp_path, observe=killer) as trainer:
        trainer.fit()
        return trainer.finish()


def test_every_actor_is_killed_in_turn_and_the_run_recovers(
    local_ray, tiny_recipe, hold_after, events_of, surviving_commits, assert_nothing_lost, tmp_path
):
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


def test_actors_that_hang_are_replaced(local_ray, tiny_recipe, hold_after, events_of, assert_nothing_lost, tmp_path):
    hold = hold_after(20)
    killer = Killer({2: "generator-0", 5: "store"}, hold, hangs=(2, 5))
    limits = LimitsSpec(poll_s=0.5, health_timeout_s=8.0)
    result = run(tiny_recipe(algorithm=hold.algorithm, total_steps=30), tmp_path, killer, Deployment(limits=limits))
    assert killer.killed == ["generator-0", "store"]
    assert (result.restarts, result.steps) == ({"generator-0": 1, "store": 1}, 30)
    assert_nothing_lost(events_of(result.run_dir), result)


def test_ranks_start_anew_together_when_one_of_them_dies_or_hangs(
    local_ray, tiny_recipe, hold_after, events_of, assert_nothing_lost, tmp_path, caplog
):
    """The run saves every update, so that kills may fall into a save."""
    hold = hold_after(12)
    killer = Killer({3: "learner", 7: "learner-1"}, hold, hangs=(7,))
    recipe = tiny_recipe(algorithm=hold.algorithm, total_steps=16, checkpoint=CheckpointSpec(save_freq=1))
    limits = LimitsSpec(poll_s=0.5, health_timeout_s=8.0)
    result = run(recipe, tmp_path, killer, Deployment(learner=RanksSpec(ranks=2), limits=limits))
    assert killer.killed == ["learner", "learner-1"]
    assert (result.restarts, result.steps) == ({"learner": 2}, 16), "a failure of the group counts once"
    assert result.max_trained_lag <= recipe.staleness.max_lag
    assert_nothing_lost(events_of(result.run_dir), result)
    told = [record.getMessage() for record in caplog.records if "died and is restarted" in record.getMessage()]
    first, second = told
    assert first.startswith("learner died")
    hung = r"learner-1 died .* has not answered for \d+ s: its node answers, and its process was stopped by a signal; "
    assert re.match(
        hung + r"all ranks start anew. After update \d+ " r"they were last heard at: learner \w+ for \d+ s, in .*, learner-1 ",
        second,
    ), second
    assert "has not answered" not in first


# ------------------------------------------------------------------------------- led from Python, stopped and resumed


class Led(NamedTuple):
    """A run led by two Trainers; `folder` holds its exports, `result` is the second one's at the end."""

    recipe: Recipe
    folder: Path
    result: RunResult


@pytest.fixture(scope="module")
def led(local_ray, tiny_recipe_in, tmp_path_factory) -> Led:
    """Five updates, and stopped; one more by a second Trainer, which then goes back to a checkpoint of the first one's, makes
    these four again, and three more after its learner died between two fits."""
    folder = tmp_path_factory.mktemp("led")
    learner, kept = LearnerSpec(batch_groups=4, lr=1e-2), CheckpointSpec(save_freq=50, keep_last_n=4)
    recipe = tiny_recipe_in(folder, total_steps=20, learner=learner, checkpoint=kept)
    with Trainer(recipe, runs_dir=folder) as first:
        assert first.fit(2).steps == 2
        checkpoint = first.save_checkpoint()
        assert checkpoint.name == "step_000002"
        first.save_pretrained(folder / "at-2")
        result = first.fit(3)
        assert (result.steps, result.samples) == (5, 5 * 16)
        first.save_pretrained(folder / "at-5")
    pids: dict[str, int] = {}
    with Trainer(recipe, runs_dir=folder, resume_from=folder / "tiny", observe=lambda run: pids.update(run.pids)) as second:
        assert second.fit(1).steps == 6
        second.load_checkpoint(checkpoint)
        second.save_pretrained(folder / "again-2")
        result = second.fit(4)
        assert (result.steps, result.samples) == (6, 6 * 16)
        os.kill(pids["learner"], signal.SIGKILL)
        assert second.fit(3).steps == 9
        return Led(recipe, folder, second.finish())


def test_a_checkpoint_is_gone_back_to_and_exported(led):
    names = ("at-2", "at-5", "again-2")
    at_2, at_5, again_2 = (AutoModelForCausalLM.from_pretrained(led.folder / name).state_dict() for name in names)
    assert all(torch.equal(tensor, again_2[name]) for name, tensor in at_2.items())
    assert not any(torch.equal(tensor, at_5[name]) for name, tensor in at_2.items())
    assert AutoTokenizer.from_pretrained(led.folder / "at-5").chat_template


def test_a_stopped_run_resumes_where_it_was_and_a_learner_that_dies_between_two_fits_is_replaced(
    led, events_of, surviving_commits, assert_nothing_lost
):
    assert (led.result.steps, led.result.samples, led.result.restarts) == (9, 9 * 16, {"learner": 1})
    events = events_of(led.result.run_dir)
    assert_nothing_lost(events, led.result)
    # At the start, resumed where it was stopped, gone back, and after the death: each fit ends with a checkpoint.
    assert [e.committed for e in events if isinstance(e, ev.LearnerFenced)] == [0, 5, 2, 6]
    commits = surviving_commits(events)
    assert [b.version.update - a.version.update for a, b in pairwise(commits)] == [1] * 8
    assert [c.version.incarnation for c in commits] == [1, 1, 3, 3, 3, 3, 4, 4, 4]
    made = {c.version: c.groups for c in events if isinstance(c, ev.BatchCommitted)}
    for update, first_made_by in ((3, 1), (4, 1), (5, 1), (6, 2)):
        assert made[Version(3, update)] == made[Version(first_made_by, update)], "another batch than before was trained"


def test_resuming_asks_for_the_same_groups_and_a_new_run_sets_the_old_aside(
    led, events_of, surviving_commits, assert_nothing_lost, caplog
):
    recipe, folder = led.recipe, led.folder
    recorded = (folder / "tiny" / "recipe.json").read_bytes()
    with pytest.raises(ConfigError, match=r"seed=1, but it began with 0"):
        launch(replace(recipe, seed=1), runs_dir=folder, resume=True)
    data = Path(recipe.data.files[0])
    before = data.read_text()
    data.write_text(before.replace("00+00=", "01+01="))
    for _ in range(2):  # a refused attempt must not make the next one pass
        with pytest.raises(DataError, match="changed since"):
            launch(recipe, runs_dir=folder, resume=True)
    assert (folder / "tiny" / "recipe.json").read_bytes() == recorded
    data.write_text(before)
    with pytest.raises(ConfigError, match=r"is no checkpoint of the run(.|\n)*step_000002"):
        Trainer(recipe, runs_dir=folder, resume_from=folder / "other" / "step_000001")
    with pytest.raises(ConfigError, match="no checkpoint"):
        launch(recipe, name="fresh", runs_dir=folder, resume=True)
    with pytest.raises(
        ConfigError, match=r"no checkpoint of update 7; resume from one of step_000000, step_000002, step_000006, step_000009"
    ):
        launch(recipe, runs_dir=folder, resume=7)
    caplog.set_level(logging.INFO, "asyncrl")
    again = launch(replace(recipe, total_steps=11), runs_dir=folder, resume=6)  # though it was finished
    assert again.steps == 11
    assert "resumed from step_000006: 3 later batches are trained again first, from the log" in caplog.text
    assert [e.committed for e in events_of(again.run_dir) if isinstance(e, ev.LearnerFenced)] == [0, 5, 2, 6, 6]

    tail = unsealed(folder / "tiny" / "replay" / "events")
    while surviving_commits(events_of(again.run_dir))[-1].version.update == 11:  # as if the power had failed
        os.truncate(tail, tail.stat().st_size - 100)
    caplog.clear()
    after = launch(replace(recipe, total_steps=12), runs_dir=folder, resume=True)
    assert after.steps == 12
    assert "step_000011 was given up" in caplog.text
    events = events_of(after.run_dir)
    assert [e.committed for e in events if isinstance(e, ev.LearnerFenced)] == [0, 5, 2, 6, 6, 6]
    assert_nothing_lost(events, after)

    assert launch(replace(recipe, total_steps=1), runs_dir=folder).steps == 1
    earlier = folder / "tiny" / "previous-1"
    assert (earlier / "checkpoints" / "step_000012").is_dir()
    assert f"{folder / 'tiny'} held an earlier run, which is now in {earlier}" in caplog.text
