"""The reward stage: leases finished rollouts from the store, has them scored, delivers the verdicts."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncrl.errors import Closed
from asyncrl.interfaces import RewardStore
from asyncrl.report.timing import TimeInState
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample, Verdict
from asyncrl.rundir import redact
from asyncrl.types import Report, Score, Status, Unscored, UnscoredLease

if TYPE_CHECKING:
    from asyncrl.reward.asking import AskFirst

log = logging.getLogger(__name__)
_LOGGED_ERRORS = 20  # the first of them; all are in the replay log
# While one process is stuck in a slow sample and another is free, the store is asked this often for more.
_ASK_AGAIN_S = 0.1

Tag = tuple["ScoringLease | Future[Score]", Unscored]  # who gets the verdict: the store, or who asked for it by itself
Shape = Callable[[float, Sequence[int]], tuple[float, dict[str, float]]]


@dataclass(eq=False)
class ScoringLease:
    """A lease that is being worked on.

    Told apart by identity, not by number: a store that restarted may give a number again.
    """

    lease: int  # the store's number
    owed: int  # verdicts still to deliver
    lease_s: float
    renew_at: float  # monotonic seconds


class RewardWorker:
    """Scores rollouts until the store says that there will be no more, or `stop`.

    Verdicts are delivered as they come: a slow sample holds up nobody else's. New rollouts are leased as soon as a
    process is free, and leases are renewed at a third of their time. The main loop waits for the store (`wait:store`)
    or for models (`wait:models`), or works (`busy`). `run` starts the pool and closes it.

    record: the dataset row of a rollout as JSON, for TRL's functions.
    shape: what becomes of the reward of a training rollout, given its response's tokens, and named parts to add to the
    function's. Evaluation is scored as it is, without turn- and token-level rewards.
    """

    def __init__(
        self,
        store: RewardStore,
        pool: "RewardPool[Tag] | AskFirst[Tag]",
        *,
        name: str,
        record: Callable[[Unscored], str] = lambda item: "{}",
        shape: Shape = lambda reward, response_ids: (reward, {}),
        lease_size: int = 64,
        poll_s: float = 5.0,
    ) -> None:
        self._store = store
        self._pool = pool
        self._name = name
        self._record = record
        self._shape = shape
        self._lease_size = lease_size
        self._poll_s = poll_s
        self._time = TimeInState()
        self._held: set[ScoringLease] = set()
        self._counts: Counter[Status] = Counter()
        self._began = time.monotonic()
        self._ended = False
        self._trials: deque[tuple[Future[Score], Unscored]] = deque()
        self._stop = threading.Event()

    def run(self) -> None:
        """Returns at the end of the data, after `stop`, or when the store closes. Raises ConfigError for a reward
        function that can't be loaded, and what the store raises (`Fenced`, `Unavailable`)."""
        try:
            with self._pool:
                self._began = time.monotonic()
                while not self._stop.is_set() and not (self._ended and not self._pool.pending):
                    self._step()
        except Closed:
            pass  # the run is stopping: a clean end
        finally:
            self._stop.set()
            self._time.enter("wait:end")

    def verdict(self, item: Unscored) -> Score:
        """Of a rollout that the store does not know. Waits for it; raises Closed if the run is over before. From any thread."""
        future: Future[Score] = Future()
        self._trials.append((future, item))
        while not self._stop.is_set():
            with suppress(TimeoutError):
                return future.result(self._poll_s)
        raise Closed(f"{self._name} has ended, and scores nothing")

    def stop(self) -> None:
        """Asks `run` to return; it does after its current wait, of `poll_s` at most. Callable from any thread."""
        self._stop.set()

    def retire(self) -> None:
        """Ends `run` when what it has leased is delivered; it leases no more. Callable from any thread."""
        self._ended = True

    def report(self) -> Report:
        """Samples so far by status, processes replaced, and samples per second since the start."""
        scored = self._counts.total()
        gauges = {
            "scored": float(scored),
            "invalid": float(self._counts["invalid"]),
            "timeout": float(self._counts["timeout"]),
            "scores_per_s": scored / max(time.monotonic() - self._began, 1e-9),
            "process_restarts": float(self._pool.restarts),
        }
        progress = scored + self._pool.polls
        return Report(name=self._name, role="reward", seconds=self._time.seconds(), gauges=gauges, progress=progress)

    def _step(self) -> None:
        while self._trials:
            trial = self._trials.popleft()
            self._pool.submit([(trial, self._sample(trial[1]))])
        if not self._ended and self._pool.has_capacity:
            wait_s = 0.0 if self._pool.pending else self._poll_s
            with self._time.span("wait:store"):
                lease = self._store.lease_unscored(self._lease_size, wait_s)
            if lease.ended:
                self._ended = True
            self._accept(lease)
        if not self._pool.pending:
            return
        self._time.enter("wait:models" if self._pool.asking else "busy")
        wait_s = _ASK_AGAIN_S if self._pool.has_capacity and not self._ended else self._poll_s
        renew_in_s = min((held.renew_at for held in self._held), default=math.inf) - time.monotonic()
        self._deliver(self._pool.poll(max(0.0, min(wait_s, renew_in_s))))
        self._renew()

    def _accept(self, lease: UnscoredLease) -> None:
        if not lease.items:
            return
        self._time.enter("busy")
        held = ScoringLease(lease.lease, len(lease.items), lease.lease_s, time.monotonic() + lease.lease_s / 3)
        self._held.add(held)
        lost = [(item, told) for item in lease.items if (told := item.episode) is not None and told.status != "ok"]
        self._deliver([((held, item), Verdict(told.status, error=told.error)) for item, told in lost])
        whole = [item for item in lease.items if item.episode is None or item.episode.status == "ok"]
        self._pool.submit(((held, item), self._sample(item)) for item in whole)

    def _sample(self, item: Unscored) -> Sample:
        p, record = item.prompt, self._record(item)
        told = "null" if item.episode is None else item.episode.for_rewards(item.purpose)
        texts = p.data_source, item.text, p.ground_truth, p.extra_info, record
        return Sample(*texts, item.response_ids, item.turns, told, item.group, purpose=item.purpose)

    def _deliver(self, verdicts: list[tuple[Tag, Verdict]]) -> None:
        by_lease: dict[ScoringLease, list[Score]] = {}
        for (held, item), verdict in verdicts:
            if isinstance(held, Future):
                held.set_result(self._score(item, verdict))
                continue
            self._counts[verdict.status] += 1
            if verdict.status != "ok" and self._counts.total() - self._counts["ok"] <= _LOGGED_ERRORS:
                log.warning("group %d, rollout %d: %s: %s", item.group, item.rollout, verdict.status, verdict.error)
            by_lease.setdefault(held, []).append(self._score(item, verdict))
        for held, scores in by_lease.items():
            self._store.score(held.lease, scores)
            held.owed -= len(scores)
            if held.owed == 0:
                self._held.remove(held)

    def _renew(self) -> None:
        now = time.monotonic()
        for held in self._held:
            if now >= held.renew_at:
                self._store.extend(held.lease)
                held.renew_at = now + held.lease_s / 3

    def _score(self, item: Unscored, verdict: Verdict) -> Score:
        reward, parts = verdict.reward, verdict.parts
        if reward is not None and item.purpose == "train":
            reward, added = self._shape(reward, item.response_ids)
            parts = {**parts, **added}
        return Score(
            group=item.group,
            rollout=item.rollout,
            attempt=item.attempt,
            status=verdict.status,
            reward=reward,
            parts=parts,
            error=redact(verdict.error) if verdict.error else "",
            token_rewards=verdict.token_rewards if item.purpose == "train" else None,
            said=verdict.said,
            scoring=verdict.scoring and (f"{self._name}/{verdict.scoring[0]}", *verdict.scoring[1:]),
        )
