"""What a user's program is told while a run goes on, in the process that leads it."""

from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from asyncrl.rundir import RunDir
from asyncrl.types import GroupCounts, Record


class SavedCheckpoint(Struct, frozen=True, kw_only=True):
    """A checkpoint that is on the disk, whole."""

    update: int  # after which it was made
    folder: str


class Callbacks(Struct, frozen=True, kw_only=True):
    """Functions that a run calls with what it learns, during `launch` and `Trainer.fit` and `finish`; None: nothing.

    They are called in the process and thread that lead the run, one after the other, up to about twice a second, in the order
    below: what one round of the supervisor learnt. Actors don't wait for them: generation, rewards and learning go on. But
    nobody watches over the actors meanwhile, so that an actor that died is replaced only when they have returned. What one
    raises is raised by `fit`, when the update under way is made and saved, as at an interrupt.
    """

    # How many groups are reserved, trained, filtered, …, whenever that changed. The rollouts themselves are in the replay log:
    # `asyncrl.replay.open(run_dir).rollouts()`.
    on_rollouts: Callable[[GroupCounts], Any] | None = None
    # The metrics of an update, once it is committed: a line of metrics.jsonl. What a restored learner makes again comes again.
    on_update: Callable[[Record], Any] | None = None
    on_eval: Callable[[Record], Any] | None = None  # the same of an evaluation
    on_checkpoint: Callable[[SavedCheckpoint], Any] | None = None  # a checkpoint, once its folder is there


class CallbackQueue:
    """What is to be told. `note` is called within the supervisor's rounds, `run` between them, where a signal may cut in."""

    def __init__(self, callbacks: Callbacks, paths: RunDir) -> None:
        self.failure: Exception | None = None  # what a callback raised
        self._callbacks = callbacks
        self._paths = paths
        self._due: deque[tuple[Callable[[Any], Any], Any]] = deque()
        self._counts = GroupCounts()
        self._steps = set(paths.steps())  # those of earlier starts are told of no more

    def note(self, counts: GroupCounts, records: list[Record]) -> None:
        """records: those that are new."""
        told = self._callbacks
        if told.on_rollouts is not None and counts != self._counts:
            self._due.append((told.on_rollouts, counts))
        self._counts = counts
        for record in records:
            callback = told.on_eval if record.kind == "eval" else told.on_update
            if callback is not None:
                self._due.append((callback, record))
        if told.on_checkpoint is None:
            return
        steps = self._paths.steps()
        for folder in steps:
            if folder not in self._steps:
                self._due.append((told.on_checkpoint, SavedCheckpoint(update=RunDir.update_of(folder), folder=str(folder))))
        self._steps = set(steps)

    def run(self) -> None:
        """Calls what is due, in order. What one raises goes through, and the rest is called the next time."""
        while self._due:
            callback, what = self._due.popleft()
            try:
                callback(what)
            except Exception as error:
                self.failure = error
                raise
