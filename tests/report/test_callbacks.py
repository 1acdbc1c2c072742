"""What is told, to whom, in which order; and that an error leaves the rest to be told."""

from pathlib import Path

import pytest

from asyncrl.report.callbacks import CallbackQueue, Callbacks, SavedCheckpoint
from asyncrl.rundir import RunDir
from asyncrl.types import GroupCounts, Record, Version


def record(sequence: int, kind: str, update: int) -> Record:
    return Record(sequence=sequence, time=0.0, kind=kind, version=Version(1, update), metrics={})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run").create()
    made.checkpoint(0).mkdir()  # of an earlier start
    return made


def test_a_round_is_told_in_order_between_rounds_and_once(run: RunDir) -> None:
    told: list = []
    queue = CallbackQueue(
        Callbacks(on_rollouts=told.append, on_update=told.append, on_eval=told.append, on_checkpoint=told.append), run
    )
    counts, records = GroupCounts(reserved=4, trained=4), [record(1, "step", 1), record(2, "eval", 1), record(3, "step", 2)]
    run.checkpoint(2).mkdir()
    queue.note(counts, records)
    assert told == []
    queue.run()
    saved = SavedCheckpoint(update=2, folder=str(run.checkpoint(2)))
    assert told == [counts, *records, saved]
    queue.note(counts, [])
    queue.run()
    assert len(told) == 5
    run.checkpoint(2).rmdir()  # given up: the learner was restored, and makes it again
    queue.note(counts, [])
    run.checkpoint(2).mkdir()
    queue.note(counts, [])
    queue.run()
    assert told[5:] == [saved]


def test_each_is_called_with_its_own_alone(run: RunDir) -> None:
    told: list = []
    queue = CallbackQueue(Callbacks(on_eval=told.append), run)
    run.checkpoint(3).mkdir()
    queue.note(GroupCounts(reserved=1), [record(1, "step", 1), record(2, "eval", 1)])
    queue.run()
    assert [one.kind for one in told] == ["eval"]


def test_what_one_raises_goes_through_and_the_rest_is_told_later(run: RunDir) -> None:
    told: list = []

    def picky(one: Record) -> None:
        if one.version.update == 1:
            raise ValueError("not this one")
        told.append(one.version.update)

    queue = CallbackQueue(Callbacks(on_update=picky), run)
    queue.note(GroupCounts(), [record(1, "step", 1), record(2, "step", 2)])
    with pytest.raises(ValueError, match="not this one") as caught:
        queue.run()
    assert queue.failure is caught.value
    queue.run()
    assert told == [2]
