"""The generator: reserves tickets, has the engine answer them, submits rollouts, and swaps weights in between.

    store.reserve ─► feed ─► engine ─► (future) ─► submit ─► store.submit
    weights.next  ─► sync ─► engine.update_weights        waits for: a running reserve, eval requests in flight

Three threads, because each waits for somebody else. The first error in any of them ends all, and `run` raises it.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from asyncrl.errors import Closed, Fenced, Unavailable
from asyncrl.generate.workload import Done, GeneratorCounters, Held, Workload, requests_of, rollout_of
from asyncrl.interfaces import Engine, GeneratorStore, WeightSource
from asyncrl.report.timing import TimeInState
from asyncrl.types import Generation, Report, Reserved, Rollout, Ticket, Version

JOIN_S = 30.0  # how long a thread may take to notice the end, beyond its long poll
NOTICE_S = 0.5  # longest wait for weights: it can't be cut short, and so delays the end of every run


class Generator:
    """Runs one engine for one store. Owns neither: whoever made them closes them.

    group_size: rollouts per training ticket, its baseline included; a ticket is asked for when that many slots are free.
    poll_s: longest wait for the next sign of life to the store, which is also when cancellations are heard while all slots are
    taken. reserve_wait_s: long poll of one `reserve`; a swap waits for it, and a newer version is told only after it.
    health_timeout_s: an engine that has work and makes no step for so long is an error.
    """

    def __init__(
        self,
        engine: Engine,
        store: GeneratorStore,
        weights: WeightSource,
        *,
        name: str,
        poll_s: float,
        group_size: int,
        reserve_wait_s: float = 0.1,
        health_timeout_s: float = 60.0,
    ) -> None:
        self._engine, self._store, self._weights = engine, store, weights
        self._name, self._poll_s, self._group_size = name, poll_s, group_size
        self._reserve_wait_s, self._health_timeout_s = reserve_wait_s, health_timeout_s
        self._ledger = TimeInState()
        # Guards everything below; notified at every change. Reentrant: a future may end inside `submit_group`.
        self._cond = threading.Condition()
        self._work = Workload()
        self._counters = GeneratorCounters()
        self._version: Version | None = None
        self._reserving = self._swap_wanted = self._swapping = False
        self._more_evals = False  # the last reserve brought eval tickets for our weights: the next may bring more
        self._ended = self._stopping = False
        self._failure: Exception | None = None
        self._too_old: Version | None = None  # weights for which the store has no ticket; newer ones are waited for
        self._heard = -float("inf")  # when the store last heard of us (monotonic)

    # --------------------------------------------------------------------------------------------- life

    def run(self) -> None:
        """Blocks until the store has ended and all is submitted, or `stop`, or the first error, which it raises.

        A store or bus that raises Closed or Fenced ends the run like `stop`. An engine that hangs is Unavailable.
        After an error the engine is left as it stands: close it.
        """
        loops = {"feed": self._feed, "submit": self._submit, "sync": self._sync}
        threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"{self._name}-{kind}", daemon=True)
            for kind, loop in loops.items()
        ]
        with self._cond:
            self._counters.start()
            self._mark()
        for thread in threads:
            thread.start()
        self._guard(self._watch)
        self.stop()
        if self._failure is None:  # an engine that hangs would keep us waiting for its step
            self._engine.abort()
        deadline = time.monotonic() + (self._poll_s + JOIN_S if self._failure is None else 2 * NOTICE_S)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._failure is not None:
            raise self._failure
        if stuck := [thread.name for thread in threads if thread.is_alive()]:
            raise Unavailable(f"{self._name}: {stuck} did not end {self._poll_s + JOIN_S} s after the stop; kill the process")

    def stop(self) -> None:
        """Ends `run` soon; unfinished rollouts are dropped, and the store reissues them. Returns at once."""
        with self._cond:
            self._stopping = True
            self._cond.notify_all()

    def _over(self) -> bool:
        return self._stopping or self._failure is not None

    def _watch(self) -> None:
        """Until the run is over: has the engine prove, again and again, that it makes progress."""
        while True:
            with self._cond:
                over = self._cond.wait_for(
                    lambda: self._over() or (self._ended and self._work.empty), timeout=self._health_timeout_s / 2
                )
            if over:
                return
            self._engine.health(self._health_timeout_s / 2)

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except (Closed, Fenced):
            self.stop()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._cond:
            # After a stop, peers vanish in any order: their errors are no news.
            if not self._over():
                self._failure = error
            self._cond.notify_all()

    # --------------------------------------------------------------------------------------------- feed

    def _room(self) -> int:
        """How many tickets to ask for now. The engine may have fewer slots than requests unfinished: then none."""
        waits_for_swap = self._swapping or (self._swap_wanted and not self._evaluating())
        too_old = self._too_old == self._version and self._since_heard() < self._poll_s
        if self._version is None or self._ended or waits_for_swap or too_old:
            return 0
        if self._work.unfinished == 0:
            return max(1, self._engine.slots // self._group_size)
        return max(0, self._engine.slots - self._work.unfinished) // self._group_size

    def _evaluating(self) -> bool:
        """Whether a swap would tear an evaluation that is pinned to the present weights."""
        return self._work.unfinished_eval > 0 or self._more_evals

    def _since_heard(self) -> float:
        return time.monotonic() - self._heard

    def _feed(self) -> None:
        while True:
            with self._cond:
                # Waits here, not in the store, while the slots are taken: a freed slot must be refilled at once.
                rest = max(0.0, self._poll_s - self._since_heard()) if self._version else self._poll_s
                self._cond.wait_for(lambda: self._over() or self._room() > 0, timeout=rest)
                if self._over():
                    return
                if (version := self._version) is None:
                    continue
                k, held = self._room(), self._work.groups()
                self._reserving = k > 0
            reserved = self._store.reserve(k, version, held, self._reserve_wait_s if k else 0.0)
            self._take(reserved, version, asked=k > 0)

    def _take(self, reserved: Reserved, version: Version, *, asked: bool) -> None:
        """Drops what was cancelled, begins what was reserved. `version` is still the engine's: a swap waits for us."""
        with self._cond:
            self._heard = time.monotonic()
            for group in reserved.cancelled:
                self._work.forget(group)
        for group in reserved.cancelled:
            self._engine.abort(group)
        for ticket in reserved.tickets:
            if ticket.purpose == "eval" and ticket.pinned != version:
                self._counters.eval_left()  # never named as held, so the store gives it to a generator at that version
            else:
                self._begin(ticket)
        with self._cond:
            if asked:
                self._reserving = False
                self._more_evals = any(ticket.pinned == version for ticket in reserved.tickets)
                self._too_old = version if "too old" in reserved.waiting_for else None
                self._counters.waited(reserved.waiting_for)
            self._ended = self._ended or reserved.ended
            self._mark()
            self._cond.notify_all()

    def _begin(self, ticket: Ticket) -> None:
        now = time.time()
        held = Held(ticket, reserved=now, started=now, unsubmitted=len(ticket.rollouts))
        with self._cond:
            self._work.begin(held)
            self._mark()
        for rollout, future in zip(ticket.rollouts, self._engine.submit_group(requests_of(ticket)), strict=True):
            future.add_done_callback(partial(self._finished, held, rollout))

    # ------------------------------------------------------------------------------------------- submit

    def _finished(self, held: Held, rollout: int, future: "Future[Generation]") -> None:
        """Called by the engine's thread, once per request."""
        with self._cond:
            self._work.finish(Done(held, rollout, future, time.time()))
            self._mark()
            self._cond.notify_all()

    def _submit(self) -> None:
        while True:
            with self._cond:
                self._cond.wait_for(lambda: self._over() or len(self._work.done) > 0)
                if self._over():
                    return
                # Still counted as in hand (their groups are held) until the store has them.
                done = list(self._work.done)
                self._work.done.clear()
            rollouts = [(item, rollout) for item in done if (rollout := self._rollout(item)) is not None]
            if rollouts:
                self._store.submit([rollout for _, rollout in rollouts])
            with self._cond:
                self._work.submitted([item for item, _ in rollouts])
                self._cond.notify_all()

    def _rollout(self, done: Done) -> Rollout | None:
        """None for what nobody wants any more. An abort that the store did not ask for gives the whole group back to it."""
        generation: Generation = done.future.result()
        with self._cond:
            if not self._work.wanted(done.held):
                return None
            if generation.finish_reason == "abort":
                self._work.forget(done.held.ticket.group)
                return None
            self._counters.rollout(len(generation.token_ids))
        return rollout_of(done, generation, self._name)

    # --------------------------------------------------------------------------------------------- sync

    def _sync(self) -> None:
        while not self._over():
            news = self._weights.next(self._version, min(self._poll_s, NOTICE_S))
            if news is None:
                continue
            with self._cond:
                self._swap_wanted = True
                self._cond.wait_for(lambda: self._over() or not (self._reserving or self._evaluating()))
                if self._over():
                    return
                self._swapping, self._swap_wanted = True, False
                self._mark()
            swap = self._engine.update_weights(*news)
            del news  # its memory may go before the next version comes
            with self._cond:
                self._swapping, self._version = False, swap.version
                self._counters.swap(swap)
                self._mark()
                self._cond.notify_all()

    # ------------------------------------------------------------------------------------------- report

    def _mark(self) -> None:
        """Books the time from now on."""
        if self._swapping:
            state = "sync"
        elif self._work.unfinished:
            state = "busy"
        else:
            # Both None before the first weights.
            state = "wait:weights" if self._too_old == self._version else "wait:store"
        self._ledger.enter(state)

    def report(self) -> Report:
        """Time per state, and counters since the start of `run`."""
        with self._cond:
            gauges, slots = self._counters.gauges(), self._engine.slots
            gauges["active_slots"] = float(min(self._work.unfinished, slots))
            gauges["slots"] = float(slots)
            gauges["held_groups"] = float(len(self._work.groups()))
            gauges["update"] = float(-1 if self._version is None else self._version.update)
        gauges |= {f"engine/{name}": value for name, value in self._engine.gauges().items()}
        gauges |= {f"bus/{name}": value for name, value in self._weights.gauges().items()}
        return Report(name=self._name, role="generator", seconds=self._ledger.seconds(), gauges=gauges)
