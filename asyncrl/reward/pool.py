"""Killable scoring processes. A reward function can raise, hang, exit or crash: it costs its own sample only."""

import selectors
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import msgspec
from msgspec.structs import replace

from asyncrl.config import RewardTerm
from asyncrl.forks import Forks
from asyncrl.reward.results import Sample, Verdict
from asyncrl.reward.scorer import Scorer

T = TypeVar("T")

# A process is given as many samples as take about this long: enough to hide the hand-over, too few to hold others up.
_BATCH_S = 0.01
_BATCH_SAMPLES = 64
_WAIT_S = 10.0
_LOADING_S = 0.1  # how often `polls` rises while processes load


def score_all(pool: Any, samples: Sequence[Sample]) -> list[Verdict]:
    """Verdicts on samples, in their order, without who scored them when.

    pool: a `RewardPool[int]`, or what is used as one, that has nothing else to do.
    """
    if pool.pending:
        raise RuntimeError(f"map on a pool with {pool.pending} pending samples would swallow their verdicts; poll them first")
    pool.submit(enumerate(samples))
    verdicts: dict[int, Verdict] = {}
    while pool.pending:
        verdicts.update(pool.poll(_WAIT_S))
    return [replace(verdicts[index], scoring=None) for index in range(len(samples))]


class RewardPool(Generic[T]):
    """`processes` forks of one that has loaded the functions, each scoring one sample at a time with a deadline of `deadline_s`
    wall-clock seconds.

    The clock of a sample starts when its process turns to it; loading is not counted. Past it the process and all it
    started are killed and replaced, and the sample is `timeout`. A process that dies leaves its sample `invalid`.
    Samples that waited behind it in the same process are scored again from their start. `T` tags a sample.

    Use from one thread. rewards: one function, or `RewardSpec.terms()`. log: where the functions' prints go; None: standard
    error. memory_bytes: as RewardSpec.memory_bytes.
    """

    asking = False  # whether everything pending waits for models (AskFirst)

    def __init__(
        self,
        rewards: str | Sequence[RewardTerm],
        *,
        processes: int = 1,
        deadline_s: float = 10.0,
        start_timeout_s: float = 120.0,
        log: Path | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self.restarts = 0
        self.polls = 0  # rises while processes load or score, which both have a limit of their own
        terms = (RewardTerm(function=rewards),) if isinstance(rewards, str) else tuple(rewards)
        self._forks = Forks(
            "asyncrl.reward.process",
            msgspec.json.encode(terms),
            f"reward.function={', '.join(term.what for term in terms)!r}",
            log=log,
            start_timeout_s=start_timeout_s,
            memory_bytes=memory_bytes,
        )
        self._count = processes
        self._deadline_s = deadline_s
        self._start_timeout_s = start_timeout_s
        self._selector = selectors.DefaultSelector()
        self._queue: deque[tuple[T, Sample]] = deque()
        self._scorers: list[Scorer[T]] = []

    def __enter__(self) -> Self:
        """Spawns the processes and waits until all have loaded the function. Raises as `poll` does."""
        self._forks.open()
        try:
            while len(self._scorers) < self._count:
                self._scorers.append(self._spawn(len(self._scorers)))
            while not all(scorer.ready for scorer in self._scorers):
                self.poll(_LOADING_S)
            self._forks.loaded(_LOADING_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def submit(self, samples: Iterable[tuple[T, Sample]]) -> None:
        """Queues tagged samples, and hands them to processes that are idle. Never waits."""
        self._queue.extend(samples)
        self._hand_out()

    @property
    def pending(self) -> int:
        """Samples submitted and not yet returned by `poll`."""
        return len(self._queue) + sum(len(scorer.flight) for scorer in self._scorers)

    @property
    def has_capacity(self) -> bool:
        """Whether more samples are welcome: nothing is queued, and a process is idle or everything is scored."""
        return not self.pending or (not self._queue and any(scorer.idle for scorer in self._scorers))

    def poll(self, wait_s: float) -> list[tuple[T, Verdict]]:
        """The verdicts that have come; waits up to `wait_s` for the first, while anything is pending, and from that one for
        _BATCH_S at the most for those behind it: to deliver them costs as much as to deliver one.

        Raises ConfigError when a process can't load the function: then none could, and respawning would never end. Raises
        Unavailable where that is no fault of the function: another process has loaded it, or this one was killed.
        """
        until = time.monotonic() + wait_s
        self.polls += 1
        verdicts: list[tuple[T, Verdict]] = []
        while True:
            self._hand_out()
            pause = min(self._next_event(), until) - time.monotonic()
            for key, events in self._selector.select(max(0.0, pause)):
                if events & selectors.EVENT_WRITE:
                    key.data.flush()
            came = [verdict for scorer in list(self._scorers) for verdict in self._attend(scorer)]
            if came and not verdicts:
                until = time.monotonic() + _BATCH_S
            verdicts += came
            if time.monotonic() >= until or (verdicts and not self.pending):
                self._hand_out()  # the processes work on while the caller is busy with these
                return verdicts

    def map(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores samples and returns their verdicts in order. Needs an otherwise unused `RewardPool[int]`."""
        return score_all(self, samples)

    def close(self) -> None:
        """Kills every process and all they started, for good. Pending samples are forgotten. Idempotent."""
        while self._scorers:
            self._scorers.pop().kill()
        self._queue.clear()
        self._forks.close()
        self._selector.close()

    def _spawn(self, number: int) -> Scorer[T]:
        return Scorer(number, self._forks.fork(), self._selector)

    def _hand_out(self) -> None:
        for scorer in self._scorers:
            if not self._queue:
                return
            if scorer.idle:
                scorer.read()  # that it has died, perhaps: then it is replaced when it is attended to
            if scorer.idle:
                fair = -(-len(self._queue) // len(self._scorers))
                count = min(_BATCH_SAMPLES, fair, max(1, int(_BATCH_S / max(scorer.mean_s, 1e-6))))
                scorer.send([self._queue.popleft() for _ in range(min(count, len(self._queue)))])

    def _next_event(self) -> float:
        """When to look even if no socket stirs: the nearest deadline."""
        return min((scorer.since + self._limit(scorer) for scorer in self._scorers if not scorer.idle), default=float("inf"))

    def _limit(self, scorer: Scorer[T]) -> float:
        return self._deadline_s if scorer.ready else self._start_timeout_s

    def _attend(self, scorer: Scorer[T]) -> list[tuple[T, Verdict]]:
        """Reads one process's verdicts, and replaces it if it died or passed its deadline."""
        verdicts = scorer.read()
        overdue = not scorer.idle and time.monotonic() >= scorer.since + self._limit(scorer)
        if not scorer.lost and not overdue:
            return verdicts
        if not scorer.ready:
            self._forks.loaded(_LOADING_S)  # raises if that is why
            raise self._forks.failed(scorer.code)
        if scorer.flight:
            tag, _ = scorer.flight.popleft()
            late = Verdict("timeout", error=f"no score within reward.deadline_s={self._deadline_s:g}")
            ended = Verdict("invalid", error=scorer.lost) if scorer.lost else late
            verdicts.append((tag, scorer.timed(ended, time.monotonic() - scorer.since)))
        self._queue.extendleft(reversed(scorer.flight))
        scorer.kill()
        number = self._scorers.index(scorer)
        self._scorers[number] = self._spawn(number)
        self.restarts += 1
        return verdicts
