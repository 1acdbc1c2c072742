"""The generator: reserves tickets, has the engine generate their rollouts, submits them, and swaps weights in between.

    store.reserve ─► feed ─► engine ─► (future) ─► submit ─► store.submit
    weights.next  ─► sync ─► engine.update_weights        waits for: a running reserve, eval requests in flight

Three threads, because each waits for somebody else; which of them may go on is said by one state (generate/states.py). The
first error in any of them ends all, and `run` raises it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from asyncrl.config import LimitsSpec
from asyncrl.errors import Closed, Fenced, Unavailable
from asyncrl.generate.states import GeneratorEvent, GeneratorState, accepts, state_after
from asyncrl.generate.workload import (
    EndedRequest,
    GeneratorCounters,
    HeldGroup,
    SingleAnswers,
    StoreReply,
    Workload,
    tickets_wanted,
)
from asyncrl.interfaces import Engine, Episodes, GeneratorStore, WeightSource
from asyncrl.report.timing import TimeInState
from asyncrl.types import TOO_OLD, Generation, Report, Reserved, Rollout, RolloutPiece, Ticket, Version

JOIN_S = 30.0  # how long a thread may take to notice the end, beyond its long poll
AHEAD_S = 0.1  # beside what fills the slots, tickets are asked for that last about so long: short rollouts join many at a time
SUBMIT_EVERY_S = 0.02  # while the engine is at work, `submit`s are so far apart: a call costs as much as 30 short rollouts
_RECALL_S = 0.1  # a `reserve` that new weights found under way is recalled that often: it may not have reached the store yet
NOTICE_S = 0.5  # longest wait for weights: it can't be cut short, and so delays the end of every run


class Generator:
    """Runs one engine for one store. Owns neither: whoever made them closes them.

    decode: token ids to text, special tokens left out; called once per rollout and once per group, for its prompt.
    group_size: rollouts per training ticket, its baseline included; a ticket is asked for when that many slots are free, or
    soon will be.
    limits: the store hears from the generator every `poll_s` at least, and the generator of cancellations, also while all slots
    are taken; an engine that has work and makes no step for `health_timeout_s` is an error.
    episodes: what makes the rollouts with the engine; None: the engine itself, an answer for each.
    """

    def __init__(
        self,
        engine: Engine,
        store: GeneratorStore,
        weights: WeightSource,
        decode: Callable[[Sequence[int]], str],
        *,
        name: str,
        group_size: int,
        limits: LimitsSpec = LimitsSpec(),
        episodes: Episodes | None = None,
    ) -> None:
        self._hands_over = episodes is None and engine.hands_over
        self._episodes = episodes or SingleAnswers(engine, self._grown if self._hands_over else None)
        self._engine, self._store, self._weights, self._decode = engine, store, weights, decode
        self._name, self._group_size = name, group_size
        self._poll_s, self._health_timeout_s = limits.poll_s, limits.health_timeout_s
        self._time = TimeInState()
        self._lock = threading.RLock()  # guards everything below. Reentrant: a future may end inside `submit_group`
        self._waiting: dict[threading.Condition, Callable[[], bool]] = {}  # whom to wake when what holds
        self._state = GeneratorState.NO_WEIGHTS
        self._version: Version | None = None
        self._work = Workload()
        self._reply = StoreReply()
        self._counters = GeneratorCounters()
        self._failure: Exception | None = None

    # ------------------------------------------------------------------------------------------- state

    def _step(self, event: GeneratorEvent) -> None:
        """Goes on to the state after `event`. Call it, as `_changed`, with the lock held."""
        self._state = state_after(self._state, event)
        self._changed()

    def _changed(self) -> None:
        """Books the time from now on, and wakes whoever waits for a change."""
        if self._state is GeneratorState.SWAPPING:
            activity = "sync"
        elif self._work.unfinished:
            activity = "busy"
        else:
            # Both None before the first weights.
            activity = "wait:weights" if self._reply.too_old == self._version else "wait:store"
        self._time.enter(activity)
        for waiter, until in self._waiting.items():
            if until():
                waiter.notify()

    def _wait(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits, with the lock held, until the run is over or `until`. False if `timeout` seconds have passed."""
        return self._wait_for(lambda: self._over() or until(), timeout)

    def _wait_for(self, until: Callable[[], bool], timeout: float | None) -> bool:
        """The same, also when the run is over. `until` is asked at every change: only when it holds is this thread woken, not
        for each of the hundred changes a second that are not for it."""
        waiter = threading.Condition(self._lock)
        self._waiting[waiter] = until
        try:
            return waiter.wait_for(until, timeout)
        finally:
            del self._waiting[waiter]

    def _follow_evaluation(self) -> None:
        """Pins or unpins the weights as the workload now needs it. Call it with the lock held, after every change to that."""
        if self._work.pinned and accepts(self._state, GeneratorEvent.PIN):
            self._step(GeneratorEvent.PIN)
        elif not self._work.pinned and accepts(self._state, GeneratorEvent.UNPIN):
            self._step(GeneratorEvent.UNPIN)

    def _over(self) -> bool:
        return self._state is GeneratorState.STOPPED

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
        with self._lock:
            self._counters = GeneratorCounters()
            self._changed()
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
        self._leave()

    def stop(self) -> None:
        """Ends `run` soon; unfinished rollouts are dropped, and the store reissues them. Returns at once."""
        with self._lock:
            self._step(GeneratorEvent.STOP)

    def retire(self) -> None:
        """Ends `run` when what it holds is submitted; it reserves no more. Returns at once."""
        with self._lock:
            self._reply.ended = True
            self._changed()
        self._store.recall()

    def _done(self) -> bool:
        """Whether there is nothing left to do, and no `reserve` is under way that might bring something."""
        return self._reply.ended and self._work.empty and not accepts(self._state, GeneratorEvent.RESERVED)

    def _leave(self) -> None:
        """Hands on what a generator that was stopped has begun, and submits what has just ended."""
        if not self._hands_over or self._work.empty:
            return
        with self._lock:
            self._wait_for(lambda: self._work.unfinished == 0, NOTICE_S)
            ended = [request for request in self._work.ended if request.future.exception() is None]
            pieces = self._work.pieces
        rollouts = [rollout for r in ended if not r.aborted and (rollout := self._rollout(r)) is not None]
        rest = [request.rest() for request in ended if request.aborted and request.held.ticket.purpose == "train"]
        with suppress(Closed, Fenced, Unavailable):  # then the rollouts are regenerated
            if rollouts:
                self._store.submit(rollouts)
            self._store.stream([*pieces, *(piece for piece in rest if piece.token_ids)])

    def _watch(self) -> None:
        """Until the run is over: has the engine prove, again and again, that it makes progress."""
        while True:
            with self._lock:
                over = self._wait(self._done, timeout=self._health_timeout_s / 2)
            if over:
                return
            self._engine.health(self._health_timeout_s / 2)

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except (Closed, Fenced):
            self.stop()
        except Exception as error:
            with self._lock:
                # After a stop, peers vanish in any order: their errors are no news.
                if not self._over():
                    self._failure = error
                self.stop()

    # --------------------------------------------------------------------------------------------- feed

    def _tickets_wanted(self) -> int:
        """How many tickets to ask for now."""
        too_old = self._reply.too_old == self._version and self._since_heard() < self._poll_s
        if too_old or self._reply.ended or not accepts(self._state, GeneratorEvent.RESERVE):
            return 0
        slots = self._episodes.slots
        ahead = min(slots, int(AHEAD_S * self._work.pace(time.monotonic())))
        return tickets_wanted(slots, self._work.unfinished, self._group_size, ahead)

    def _since_heard(self) -> float:
        return time.monotonic() - self._reply.heard

    def _feed(self) -> None:
        while True:
            with self._lock:
                # Waits here, not in the store, while the slots are taken: a freed slot must be refilled at once.
                rest = max(0.0, self._poll_s - self._since_heard()) if self._version else self._poll_s
                self._wait(lambda: self._tickets_wanted() > 0, timeout=rest)
                if self._over():
                    return
                if (version := self._version) is None:
                    continue
                k, held = self._tickets_wanted(), self._work.groups()
                if k:
                    self._step(GeneratorEvent.RESERVE)
            reserved = self._store.reserve(k, version, held, self._poll_s if k else 0.0)
            self._take(reserved, version, asked=k > 0)

    def _take(self, reserved: Reserved, version: Version, *, asked: bool) -> None:
        """Drops what was cancelled, begins what was reserved. `version` is still the engine's: a swap waits for us."""
        with self._lock:
            self._reply.heard = time.monotonic()
            for group in reserved.cancelled:
                self._work.forget(group)
            if asked:
                self._work.more_evals = any(ticket.pinned == version for ticket in reserved.tickets)
                self._follow_evaluation()
        for group in reserved.cancelled:
            self._episodes.abort(group)
        for ticket in reserved.tickets:
            if ticket.pinned not in (None, version):
                self._counters.add("evals_left")  # never named as held, so the store gives it to a generator at that version
            else:
                self._begin(ticket)
        with self._lock:
            self._reply.ended = self._reply.ended or reserved.ended
            if asked:
                self._reply.too_old = version if reserved.waiting_for == TOO_OLD else None
                if reserved.waiting_for:
                    self._counters.add("waits/" + reserved.waiting_for.replace(" ", "_"))
                self._step(GeneratorEvent.RESERVED)
            self._changed()

    def _begin(self, ticket: Ticket) -> None:
        held = HeldGroup(ticket, self._decode(ticket.prompt.ids), started=time.time(), unsubmitted=len(ticket.rollouts))
        with self._lock:
            self._work.begin(held)
            self._changed()
        for rollout, future in zip(ticket.rollouts, self._episodes.submit(ticket), strict=True):
            future.add_done_callback(partial(self._finished, held, rollout))

    # ------------------------------------------------------------------------------------------- submit

    def _grown(self, piece: RolloutPiece) -> None:
        """Called by the engine's thread."""
        with self._lock:
            self._work.grow(piece)
            self._changed()

    def _finished(self, held: HeldGroup, rollout: int, future: "Future[Generation]") -> None:
        """Called by the engine's thread, once per request."""
        with self._lock:
            self._work.finish(EndedRequest(held, rollout, future, time.time()), time.monotonic())
            self._follow_evaluation()
            self._changed()

    def _submit(self) -> None:
        due = 0.0
        while True:
            with self._lock:
                self._wait(lambda: len(self._work.ended) + len(self._work.pieces) > 0)
                self._wait(lambda: self._work.unfinished == 0, timeout=due - time.monotonic())  # what ends soon goes along
                if self._over():
                    return
                due = time.monotonic() + SUBMIT_EVERY_S
                # Their groups are held until the store has them.
                ended = list(self._work.ended)
                self._work.ended.clear()
                pieces, self._work.pieces = self._work.pieces, []
            rollouts = [(request, rollout) for request in ended if (rollout := self._rollout(request)) is not None]
            if rollouts:
                self._store.submit([rollout for _, rollout in rollouts])
            if pieces:
                self._store.stream(pieces)
            with self._lock:
                self._work.submitted([request for request, _ in rollouts])
                self._changed()

    def _rollout(self, request: EndedRequest) -> Rollout | None:
        """None for what nobody wants any more. An abort that the store did not ask for gives the whole group back to it."""
        generation: Generation = request.future.result()
        with self._lock:
            if not self._work.wanted(request.held):
                return None
            if request.aborted:
                self._work.forget(request.held.ticket.group)
                return None
            self._counters.add("rollouts")
            self._counters.add("tokens", len(generation.token_ids) - request.begun)
        return request.as_rollout(generation, self._decode(generation.token_ids), self._name)

    # --------------------------------------------------------------------------------------------- sync

    def _sync(self) -> None:
        while not self._over():
            news = self._weights.next(self._version, min(self._poll_s, NOTICE_S))
            if news is None:
                continue
            with self._lock:
                self._step(GeneratorEvent.WEIGHTS)
            if not self._may_swap():
                break
            swap = self._engine.update_weights(*news)
            del news  # its memory may go before the next version comes
            with self._lock:
                self._version = swap.version
                self._counters.swap(swap)
                self._work.swapped(swap.version, time.time())
                self._step(GeneratorEvent.SWAPPED)
        self._store.recall()  # so that the end of the run does not wait for it

    def _may_swap(self) -> bool:
        """Waits until the engine may take new weights; recalls a `reserve` that waits in the store. False: the run is over."""
        timeout = 0.0
        while True:
            with self._lock:
                if self._wait(lambda: self._state is GeneratorState.SWAPPING, timeout):
                    return not self._over()
                reserving = accepts(self._state, GeneratorEvent.RESERVED)
            if reserving:
                self._store.recall()
            timeout = _RECALL_S

    # ---------------------------------------------------------------------------------- beside the store

    def answer(self, ticket: Ticket) -> Rollout:
        """What the engine makes of a ticket for one rollout that the store does not know, beside `run`. Waits for the first
        weights, and for the answer; raises what the engine does, and Closed if the run is over before."""
        with self._lock:
            self._wait(lambda: self._version is not None)
            if self._over():
                raise Closed(f"{self._name} has ended, and answers nothing")
        held = HeldGroup(ticket, self._decode(ticket.prompt.ids), started=time.time(), unsubmitted=1)
        (future,) = SingleAnswers(self._engine).submit(ticket)
        generation = future.result()
        if generation.finish_reason == "abort":
            raise Closed(f"{self._name} was told to drop what its engine had begun")
        return EndedRequest(held, 0, future, time.time()).as_rollout(generation, self._decode(generation.token_ids), self._name)

    # ------------------------------------------------------------------------------------------- report

    def report(self) -> Report:
        """Time per state, and counters since the start of `run`. Progress is that of the engine, and weights on their way."""
        with self._lock:
            gauges, slots = self._counters.gauges(), self._engine.slots
            gauges["active_slots"] = float(min(self._work.unfinished, slots))
            gauges["slots"] = float(slots)
            gauges["held_groups"] = float(len(self._work.groups()))
            gauges["update"] = float(-1 if self._version is None else self._version.update)
        gauges |= {f"engine/{name}": value for name, value in self._engine.gauges().items()}
        gauges |= {f"bus/{name}": value for name, value in self._weights.gauges().items()}
        gauges |= {f"episode/{name}": value for name, value in self._episodes.gauges().items()}
        progress = self._engine.progress() + self._episodes.progress() + int(gauges.get("bus/received_bytes", 0))
        return Report(name=self._name, role="generator", seconds=self._time.seconds(), gauges=gauges, progress=progress)
