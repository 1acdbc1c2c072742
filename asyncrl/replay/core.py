"""The synchronous heart of the store: never waits, never reads a file. Every decision becomes events, and every change
of state is an event applied, so that a core rebuilt from the log equals the one that died."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import asyncrl.replay.log.events as ev
from asyncrl.replay.admission import Admission, Holders
from asyncrl.replay.batches import Batches
from asyncrl.replay.evaluations import Evaluations
from asyncrl.replay.ledger import Ledger, StoreContext
from asyncrl.replay.log.rows import TrainScore
from asyncrl.replay.plan import StorePlan
from asyncrl.replay.scoring import Scoring, Summary
from asyncrl.types import BatchLease, Fence, Reserved, Score, StoreReport, Version

_RECORDS_PER_REPORT = 256
Journal = Callable[[Sequence[ev.AnyEvent]], None]


class Core:
    """journal: writes the events of one call to the log, whole or not at all, before the call answers.

    history: the events of the log so far. clock: seconds, monotonic, for leases; wall: seconds since the epoch, for events.
    After an exception out of the journal, or out of the user's keep function, memory may be ahead of the log: `broken`
    says so, and the store must be rebuilt.
    """

    def __init__(
        self,
        plan: StorePlan,
        journal: Journal,
        history: Iterable[ev.AnyEvent] = (),
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._book = StoreContext(plan, clock, wall)
        self._activity = 0
        for event in history:
            self._book.ledger.apply(event)
            self._activity += 1
        self._journal = journal
        self._holders = Holders(self._book)
        self._admission = Admission(self._book, self._holders)
        self._evaluations = Evaluations(self._book, self._holders)
        self._scoring = Scoring(self._book)
        self._batches = Batches(self._book)
        self.broken: BaseException | None = None
        self._finished = False  # volatile: after a restart the end is told again only by `finish`, as a resume may undo it
        self.changes = 0  # rises whenever somebody who waits may get another answer

    @property
    def ledger(self) -> Ledger:
        """Durable state; read only."""
        return self._book.ledger

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
            if self._book.recorded:
                self.changes += 1
                self._activity += any(not isinstance(e, ev.GroupReserved | ev.GroupReissued) for e in self._book.recorded)
                self._journal(self._book.recorded)
        except BaseException as error:
            if self._book.recorded:
                self.broken = error
            raise
        finally:
            self._book.recorded = []

    # ------------------------------------------------------------------------------------ generators

    def arrive(self, worker: str, incarnation: int, held: Sequence[int]) -> None:
        """Once per `reserve` call: the holder lives, and names what it still works on."""
        self.changes += self._holders.arrive(worker, incarnation, held)

    def reserve(self, k: int, worker: str, incarnation: int, version: Version, held: Sequence[int]) -> Reserved:
        """What can be handed out now; evaluation first. The shell asks again whenever something changed."""
        self.expire()
        if self.ended():
            return Reserved(cancelled=tuple(held), ended=True)
        cancelled = tuple(g for g in held if not self._holders.holds(worker, incarnation, g))
        with self._recording():
            tickets = self._evaluations.tickets(k, worker, incarnation, version)
            if not self.ledger.ended:
                tickets += self._admission.tickets(k - len(tickets), worker, incarnation, version, held)
        waiting_for = "" if tickets or k == 0 else self._admission.waiting_for(version)
        return Reserved(tickets=tuple(tickets), cancelled=cancelled, waiting_for=waiting_for)

    def acceptable(self, summaries: Sequence[Summary], worker: str) -> list[int]:
        """Which submitted rows count; the caller writes those to the log, then calls `submit`."""
        self._holders.renew(worker)
        return self._scoring.acceptable(summaries)

    def submit(self, summaries: Sequence[Summary], first_row: int) -> None:
        with self._recording():
            self._scoring.submitted(summaries, first_row)
            self._evaluations.finish_if_complete()

    # ---------------------------------------------------------------------------------------- reward

    def lease_unscored(self, k: int, worker: str, incarnation: int) -> tuple[int, list[int]]:
        """(lease, log rows to score); (0, []) if there are none. What an earlier incarnation of the worker held comes first."""
        self.expire()
        self.changes += self._scoring.forget(worker, incarnation - 1)
        lease, items = self._scoring.lease(k, worker, incarnation)
        return lease, [self._row(*item) for item in items]

    def extend(self, lease: int, worker: str) -> None:
        self._scoring.extend(lease, worker)

    def earning(self, scores: Sequence[Score]) -> list[tuple[int, list[float]]]:
        """(log row, what its tokens earned) of those verdicts that count and say so; the caller writes each of these rows to
        the log once more, with that, then calls `score`."""
        return [(self._row(s.group, s.rollout), s.token_rewards) for s in self._scoring.counting(scores) if s.token_rewards]

    def score(self, lease: int, scores: Sequence[Score], first_row: int = 0) -> None:
        """first_row: where the rows of `earning` begin in the log."""
        with self._recording():
            self._scoring.score(lease, scores, first_row)
            self._evaluations.finish_if_complete()

    # --------------------------------------------------------------------------------------- learner

    def fence(self, committed: int) -> Fence:
        self._finished = False
        with self._recording():
            return self._batches.fence(committed)

    def lease_batch(self, incarnation: int, update: int) -> BatchLease:
        with self._recording():
            return self._batches.lease(incarnation, update)

    def rows(self, incarnation: int, groups: Sequence[int]) -> list[tuple[int, TrainScore]]:
        """(log row, score) of the rollouts to train."""
        return self._batches.rows(incarnation, groups)

    def commit(self, lease: int, version: Version, metrics: Mapping[str, float]) -> None:
        with self._recording():
            self._batches.commit(lease, version, metrics)

    def request_eval(self, version: Version) -> None:
        self._batches.check(version.incarnation)
        with self._recording():
            self._evaluations.request(version)

    def checkpointed(self, oldest_retained: int) -> None:
        with self._recording():
            self._batches.checkpointed(oldest_retained)

    # ------------------------------------------------------------------------------------ supervision

    def finish(self) -> None:
        """The last update is made: evicts what is outstanding. Evaluations that were asked for still run to their end."""
        self._finished = True
        with self._recording():
            if not self.ledger.ended:
                self._book.record(ev.Ended())
        self.changes += 1

    def forget(self, worker: str, incarnation: int) -> None:
        """Takes the work of a dead worker back; what comes of its later incarnations stays."""
        self.changes += self._holders.forget(worker, incarnation) | self._scoring.forget(worker, incarnation)

    def ended(self) -> bool:
        """Nobody will get work any more."""
        return self._finished and self.ledger.ended and not self._evaluations.outstanding()

    def expire(self) -> bool:
        """Takes work back from silent workers; whether there was any."""
        expired = self._holders.expire() | self._scoring.expire()
        self.changes += expired
        return expired

    def next_deadline(self) -> float | None:
        """When, on the injected clock, `expire` may next have something to do."""
        deadlines = (self._holders.next_deadline(), self._scoring.next_deadline())
        return min((d for d in deadlines if d is not None), default=None)

    def report(self, since: int) -> StoreReport:
        """Records after sequence `since`, at most some hundred at a time, and where everything stands."""
        ledger, lengths = self.ledger, self.ledger.lengths
        gauges: dict[str, float] = {f"store/{name}": depth for name, depth in self._depths().items()}
        gauges["length/dispatched_mean"] = lengths.dispatched_tokens / max(1, lengths.dispatched)
        gauges["length/trained_mean"] = lengths.trained_tokens / max(1, lengths.trained)
        return StoreReport(
            records=tuple(ledger.records[since : since + _RECORDS_PER_REPORT]),
            committed=ledger.committed,
            counts=ledger.counts(),
            evals_pending=(ledger.round is not None) + (ledger.queued is not None),
            activity=self._activity,
            gauges=gauges,
        )

    def _depths(self) -> dict[str, int]:
        """Training groups by where they are, and rollouts before the reward."""
        ledger = self.ledger
        return {
            "in_flight": len(ledger.groups) - len(ledger.taken) - len(ledger.ready),
            **self._scoring.depths(),
            "ready": len(ledger.ready),
            "leased": sum(len(lease.groups) for lease in ledger.leases.values()),
            "reopened": sum(len(r.groups) for r in ledger.reopened),
            "retries": len(ledger.retries),
        }

    def state(self) -> dict[str, Any]:
        """What a watchdog prints: queue depths, work in flight with its holders, leases. Ages and times in seconds."""
        ledger, now = self.ledger, self._book.clock()
        lost = {g.id for g in self._holders.lost()}
        evals = list(ledger.round.groups.values()) if ledger.round else []
        flying = [g for g in [*ledger.groups.values(), *evals] if g.in_flight()]
        return {
            "committed": ledger.committed,
            "incarnation": ledger.incarnation,
            "ended": ledger.ended,
            "depths": self._depths(),
            "in_flight": [
                {"group": g.id, "holder": f"{g.worker}.{g.incarnation}", "attempt": g.attempt, "missing": len(g.missing()),
                 "age_s": self._holders.age_s(g.id), "lost": g.id in lost, "purpose": g.purpose}
                for g in flying
            ],
            "reward_leases": {
                lease: {"worker": held.worker, "expires_in_s": held.deadline - now, "rollouts": sorted(held.items)}
                for lease, held in self._scoring.leases().items()
            },
            "batch_leases": {i: {"update": held.update, "groups": held.groups} for i, held in ledger.leases.items()},
            "evaluating": str(ledger.round.version) if ledger.round else "",
        }  # fmt: skip

    def _row(self, group: int, rollout: int) -> int:
        found = self.ledger.find(group)
        assert found is not None
        return found.rollouts[rollout].row
