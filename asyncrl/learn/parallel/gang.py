"""The learner's ranks as one: what the first of them, which leads, sees of all; and how the others serve it.

    Learner ─► Gang ─┬──────────────────────────────► Rank 0, in the learner's thread ─┬─► rank 0's result, when all have ended
                     └─► ask ─► Follower.serve ─ … ─► Rank i, in the thread of `run` ──┘
Within a verb ranks wait for each other in collectives, which nothing here ends. So the error of one may leave the others
waiting: whoever started the ranks has to end all of them, and build them anew (the supervisor does).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from asyncrl.errors import Closed, Unavailable
from asyncrl.learn.parallel.rank import Rank
from asyncrl.models.memory import FlatTensors
from asyncrl.report.timing import TimeInState
from asyncrl.types import Report, TrainRollout, Version

# ask(verb, *arguments) begins a verb on all followers. What it returns waits until all have ended it, and raises what one did.
Ask = Callable[..., Callable[[], Any]]


class Gang:
    """The interface of a Rank; each verb is made by all ranks at once, and waits for all. The result is the first one's.

    After an error the ranks may stand at different places: every later verb is refused with Unavailable.
    """

    def __init__(self, rank: Rank, ask: Ask) -> None:
        self._rank = rank
        self._ask = ask
        self._under_way = ""  # also after an error
        self.pulse, self.count = rank.pulse, rank.count

    @property
    def holds(self) -> dict[str, float]:
        """Of the first rank alone; the others report theirs."""
        return self._rank.holds

    def update(self, rollouts: Sequence[TrainRollout], committed: int) -> dict[str, float]:
        metrics: dict[str, float] = self._all("update", rollouts, committed)
        return metrics

    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        logprobs: list[float] = self._all("logprobs_of", prompt_ids, response_ids)
        return logprobs

    def save(self, version: Version, by_hand: bool = False) -> Path:
        path: Path = self._all("save", version, by_hand)
        return path

    def load(self, update: int) -> None:
        self._all("load", update)

    def staged(self, what: str) -> FlatTensors:
        return self._rank.staged(what, partial(self._all, "write"))

    def export(self, folder: str) -> None:
        self._all("export", folder)

    def _all(self, verb: str, *arguments: Any) -> Any:
        if self._under_way:
            raise Unavailable(f"learner: {verb} after a rank failed at {self._under_way}: its ranks have to be built anew")
        self._under_way = verb
        wait = self._ask(verb, *arguments)
        with self.pulse.during(verb):
            result = getattr(self._rank, verb)(*arguments)
            wait()
        self._under_way = ""
        return result


class Follower:
    """A rank other than the first, as a stage: it makes the verbs that it is asked for, one after the other, in `run`."""

    def __init__(self, name: str, build: Callable[..., Rank]) -> None:
        """build: makes this process a rank, out of the arguments of the first verb, `build`."""
        self._name = name
        self._build = build
        self._rank: Rank | None = None
        self._asked: SimpleQueue[tuple[Future[None], str, tuple[Any, ...]] | None] = SimpleQueue()
        self._over: Future[None] = Future()  # of `run`
        self._time = TimeInState()

    def serve(self, verb: str, *arguments: Any) -> None:
        """Waits until this rank has made a verb; raises what it raised, or Closed if `run` has ended, or ends before."""
        ended: Future[None] = Future()
        self._asked.put((ended, verb, arguments))
        wait([ended, self._over], return_when=FIRST_COMPLETED)
        if not ended.done():
            raise Closed(f"{self._name} has ended, and makes no {verb}")
        ended.result()

    def run(self) -> None:
        """Serves until `stop`. Raises the first error of a verb: then the process is of no use to the others."""
        self._time.enter("wait:learner")
        try:
            while (asked := self._asked.get()) is not None:
                self._answer(*asked)
        finally:
            self._over.set_result(None)

    def stop(self) -> None:
        """Ends `run` after the verbs that were asked for; idempotent, from any thread."""
        self._asked.put(None)

    def report(self) -> Report:
        """Time per state; what this rank does just now."""
        seconds = self._time.seconds()
        if self._rank is None:
            return Report(name=self._name, role="rank", seconds=seconds, gauges={})
        pulse, gauges = self._rank.pulse, dict(self._rank.holds)
        return Report(name=self._name, role="rank", seconds=seconds, gauges=gauges, progress=pulse.progress, doing=pulse.doing)

    def _answer(self, ended: "Future[None]", verb: str, arguments: tuple[Any, ...]) -> None:
        try:
            with self._time.span("busy"):
                self._make(verb, arguments)
        except BaseException as error:
            ended.set_exception(error)
            raise
        ended.set_result(None)

    def _make(self, verb: str, arguments: tuple[Any, ...]) -> None:
        if self._rank is None:
            self._rank = self._build(*arguments)
            return
        with self._rank.pulse.during(verb):
            getattr(self._rank, verb)(*arguments)
