"""The synchronous heart of the store: never waits. Every decision becomes events, and every change of state is an event
applied, so that a core rebuilt from the log equals the one that died.

A verb of the protocols in `asyncrl.interfaces` is the method of that name of one part; it takes who calls (`Key`), then the
protocol's arguments, rows as Arrow bytes. It runs alone, and what it records is in the log before its reply goes out.
"""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import asyncrl.replay.log.events as ev
from asyncrl.errors import Fenced
from asyncrl.interfaces import VERBS
from asyncrl.replay.admission import Admission, Holders
from asyncrl.replay.batches import Batches
from asyncrl.replay.context import Poll, StoreContext, Topic
from asyncrl.replay.evaluations import Evaluations
from asyncrl.replay.failures import FailureWatch
from asyncrl.replay.ledger import NOTED, to_record
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.plan import StorePlan
from asyncrl.replay.scoring import Scoring
from asyncrl.replay.streaming import Streaming
from asyncrl.report.timing import TimeInState
from asyncrl.types import TOO_OLD, Key, Reserved, StoreReport, Version

_RECORDS_PER_REPORT = 256


class StoreCore:
    """Rebuilds its state from the history of `log`. clock: monotonic seconds; wall: seconds since the epoch."""

    def __init__(
        self,
        plan: StorePlan,
        log: ReplayLog,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.context = StoreContext(plan, log, clock, wall)
        self.ledger = self.context.ledger  # read only
        self.time = TimeInState("wait:calls")
        self.holders = Holders(self.context)
        self.evaluations = Evaluations(self.context, self.holders)
        self.failures = FailureWatch(self.context)
        self.scoring = Scoring(self.context, self.holders, self.evaluations, self.failures)
        self.streaming = Streaming(self.context, self.holders)
        self.batches = Batches(self.context, self.holders, self.failures.check)
        self._admission = Admission(self.context, self.holders, self.failures.pauses)
        self._workers = dict(self.ledger.workers)  # newest incarnation of each
        self._recalled: dict[str, Key] = {}  # the newest `recall` of each
        self.verbs = {verb: self._handler(verb) for verb in VERBS}

    def _handler(self, verb: str) -> Callable[..., Any]:
        found = [part for part in (self, self.scoring, self.streaming, self.batches, self.evaluations) if hasattr(part, verb)]
        if len(found) != 1:
            raise TypeError(f"{len(found)} parts of the store have a method {verb!r}; a verb is a method of one of them")
        return getattr(found[0], verb)

    def check(self, caller: Key) -> None:
        """Raises `Fenced` for any but the newest incarnation of a worker."""
        newest = self._workers.get(caller.worker, 0)
        if caller.incarnation < newest:
            raise Fenced(f"{caller.worker} incarnation {caller.incarnation} < {newest}: a newer one took over; stop")
        if caller.incarnation > newest:
            self.context.stir(caller.worker)
        self._workers[caller.worker] = caller.incarnation

    def expire(self) -> None:
        """Takes work back from silent workers."""
        self.holders.expire()
        self.scoring.expire()

    def look_again_s(self) -> float:
        """In how many seconds to `expire` again, as long as somebody waits for its outcome."""
        clock, deadline = self.context.clock, min(self.holders.next_deadline(), self.scoring.next_deadline())
        return min(deadline - clock(), clock.step_s)

    def offers(self, topic: Topic | int | str) -> bool:
        """Whether there may be something left for the next one who waits for `topic`."""
        if topic == "tickets":
            return self.context.ended() or self.ledger.round is not None or self._admission.offers()
        return topic != "unscored" or self.scoring.waiting or self.context.ended()

    # ------------------------------------------------------------------------------------------ verbs

    def reserve(self, caller: Key, k: int, version: Version, held: Sequence[int], wait_s: float) -> Poll:
        """Evaluation first, then training. Waits for a ticket or a cancellation; the call itself is a sign of life, so it
        lasts half a lease at most. That the weights are too old is said at once: the caller can't swap while it waits."""
        self.holders.arrive(caller, held)

        def attempt() -> tuple[bool, Reserved]:
            if self.context.ended():
                return True, Reserved(cancelled=tuple(held), ended=True)
            cancelled = tuple(g for g in held if not self.holders.holds(caller, g))
            tickets = self.evaluations.tickets(k, caller, version)
            if not self.ledger.ended:
                tickets += self._admission.tickets(k - len(tickets), caller, version, held)
            waiting_for = "" if tickets or k == 0 else self._admission.waiting_for(version)
            back = self._recalled.get(caller.worker, caller)
            recalled = (back.incarnation, back.sequence) > (caller.incarnation, caller.sequence)
            done = bool(tickets or cancelled or waiting_for == TOO_OLD or recalled)
            return done, Reserved(tickets=tuple(tickets), cancelled=cancelled, waiting_for=waiting_for)

        return Poll(attempt, min(wait_s, self.context.plan.lease_s / 2), "tickets", held)

    def recall(self, caller: Key) -> None:
        self._recalled[caller.worker] = caller
        self.context.stir(caller.worker)

    def finish(self, caller: Key) -> None:
        self.context.finished = True
        if not self.ledger.ended:
            self.context.record(ev.Ended())
        self.context.stir("all")

    def limit_outstanding(self, caller: Key, groups: int) -> None:
        self._admission.most_outstanding = groups
        self.context.stir("tickets")

    def forget(self, caller: Key, worker: str, incarnation: int, excused: bool = False) -> None:
        self._workers[worker] = max(self._workers.get(worker, 0), incarnation + 1)
        self.context.stir(worker)
        self.holders.forget(worker, incarnation, excused)
        self.evaluations.finish_if_complete()
        self.scoring.take_back(worker, incarnation)

    def report(self, caller: Key, since: int) -> StoreReport:
        ledger, lengths = self.ledger, self.ledger.lengths
        self._tell_after(since)
        gauges: dict[str, float] = {f"store/{name}": depth for name, depth in self._depths().items()}
        gauges["length/dispatched_mean"] = lengths.dispatched_tokens / max(1, lengths.dispatched)
        gauges["length/trained_mean"] = lengths.trained_tokens / max(1, lengths.trained)
        gauges |= {"handover/resumed_tokens": ledger.resumed_tokens, "handover/lost_tokens": ledger.lost_tokens}
        gauges |= self._limits()
        return StoreReport(
            records=tuple(ledger.records[:_RECORDS_PER_REPORT]),
            committed=ledger.committed,
            counts=ledger.counts(),
            evals_pending=(ledger.round is not None) + (ledger.queued is not None),
            activity=self.context.activity,
            gauges=gauges,
            seconds=self.time.seconds(),
            failures=self.failures.report(),
            given_up=tuple(ledger.given_up.values()),
            settled=ledger.retained if len(ledger.records) <= _RECORDS_PER_REPORT else 0,
        )

    def _tell_after(self, since: int) -> None:
        """Forgets records that were told; a run has as many as it makes updates. A driver that starts anew asks for all, of
        which the log has those that were told before the last restart."""
        ledger = self.ledger
        told = ledger.noted - len(ledger.records)
        if since < told:
            found = islice(enumerate(self.context.log.find(*NOTED), 1), since, told)
            ledger.records[:0] = [to_record(e, i) for i, e in found if isinstance(e, NOTED)]
        else:
            del ledger.records[: since - told]

    def state(self, caller: Key) -> dict[str, Any]:
        ledger, now = self.ledger, self.context.clock()
        return {
            "committed": ledger.committed,
            "incarnation": ledger.incarnation,
            "ended": ledger.ended,
            "depths": self._depths(),
            "in_flight": [
                {"group": g.id, "holder": g.worker and f"{g.worker}.{g.incarnation}", "attempt": g.attempt,
                 "missing": len(g.missing()), "age_s": self.holders.age_s(g.id), "lost": self.holders.is_lost(g.id),
                 "purpose": g.purpose}
                for g in ledger.in_flight()
            ],
            "reward_leases": {
                lease: {"worker": held.caller.worker, "expires_in_s": held.deadline - now, "rollouts": sorted(held.items)}
                for lease, held in self.scoring.leases.items()
            },
            "batch_leases": {i: {"update": held.update, "groups": held.groups} for i, held in ledger.leases.items()},
            "evaluating": str(ledger.round.version) if ledger.round else "",
        }  # fmt: skip

    def _limits(self) -> dict[str, float]:
        """Shares of the time: in which callers with free slots got no more work because of max_lag, or of reserve_ahead; and
        in which a full batch was held back for stragglers."""
        generation, batches = self._admission.time.seconds(), self.batches.time.seconds()
        in_all = max(1e-9, sum(generation.values()))
        waits = {"max_lag": generation, "reserve_ahead": generation, "stragglers": batches}
        return {f"limit/{name}": seconds.get(name, 0.0) / in_all for name, seconds in waits.items()}

    def _depths(self) -> dict[str, int]:
        """Training groups by where they are, and rollouts before the reward."""
        ledger = self.ledger
        return {
            "in_flight": len(ledger.groups) - len(ledger.taken) - len(ledger.ready),
            **self.scoring.depths(),
            "ready": len(ledger.ready),
            "leased": sum(len(lease.groups) for lease in ledger.leases.values()),
            "reopened": sum(len(groups) for groups in ledger.reopened.values()),
            "retries": len(ledger.retries),
        }
