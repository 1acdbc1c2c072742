"""The supervisor: the only place where actors are created. It watches, restarts and stops; it carries no tensors.

Each member has one Ray reference that ends with its phase (`start`, then `run`). The loop waits on all of them at once,
so a death is noticed the moment it happens and a restart never waits for another.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from asyncrl.cluster.causes import brief, dump, first_failure, gang_standing, heard, refuse
from asyncrl.cluster.fleet import FIELDS, Fleet, excused, taken_with_its_node
from asyncrl.cluster.members import Member
from asyncrl.cluster.opening import Opening
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.scaling import Scaler
from asyncrl.cluster.transport import call_store
from asyncrl.cluster.watchdog import StallWatch
from asyncrl.errors import ActorFailed, AsyncRLError, ConfigError, DiskFull, Unavailable
from asyncrl.processes import undisturbed
from asyncrl.report.summary import RunSummary
from asyncrl.report.timing import AwakeClock
from asyncrl.rundir import redact, write_atomic
from asyncrl.types import Record, StoreReport

log = logging.getLogger(__name__)
TICK_S = 0.5
STEP_S = 2.0  # several rounds: a round that takes longer was held up, or the driver stopped


class Supervisor:
    """Owns the members of one run. `start`, then `train` as often as wanted, then `close`."""

    def __init__(
        self,
        plan: RunPlan,
        summary: RunSummary,
        observe: Callable[[Sequence[Record]], None],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """summary: kept up to date in every round, before `observe` is called with the records that came in it. between: called
        between two rounds of `train` and `finish`; what it raises ends them."""
        self._plan = plan
        self._summary = summary
        self._observe = observe
        self._between = between
        self._limits = plan.deployment.limits
        self._clock = AwakeClock(time.monotonic, STEP_S)
        self._fleet = Fleet(plan, self._clock)
        self._scaler = Scaler(self._fleet, self._limits.scale_every_s, self._clock)
        self._store, self._learner, *_ = self._members = self._fleet.members
        self._opening = Opening(plan, self._members)
        self._known: dict[str, tuple[int, Any]] = {}  # where the peers are: by name, restart count and handle
        self._dead: list[tuple[str, int, bool]] = []  # workers that the store must be told of: as `forget` takes them
        self._until: int | None = None  # the update that the learner is running to
        self._finishing = False
        self._save_after: int | None = None  # an update: until a later one is saved, a checkpoint is asked for
        self._limit = (0, 0)  # of outstanding groups, as the store was told, and which store that was
        self._stop_timeout_s = self._limits.stop_timeout_s
        self._stall = StallWatch(self._limits.stall_timeout_s, self._clock)
        self._gang_stall = StallWatch(self._limits.stall_timeout_s, self._clock)

    def start(self) -> None:
        """Creates every actor and waits until the learner and the store are up. Raises the first non-retryable error."""
        for member in self._members:
            if member.lead is member:
                member.spawn(self._plan, self._known, patient=member.role in self._fleet.elastic)
        while self._learner.phase != "idle" or self._store.phase == "starting":  # it may begin on other nodes
            self._tick()
        self._fresh_report()

    def train(self, until: int) -> None:
        """Runs until `until` updates are committed, or the data ends, and every evaluation asked for has come in. Before its
        first update `Opening` looks at the run, while the generators work on the first batch."""
        if self._summary.committed < until and not self._finishing:
            self._open()
        self._until = until
        if self._learner.phase == "idle":
            self._learner.run(until)
        self._wait()

    def _open(self) -> None:
        try:
            while not self._opening.done:
                for member, error in self._opening.look(self._summary.committed):
                    self._failed(member, error)
                if not self._opening.done:
                    self._tick()
                    self._between()
        finally:
            self._opening.forget()

    def scale(self, counts: dict[str, int | None]) -> None:
        """States how many of a role there should be from now on (None: as before); the next rounds see to it. From any thread.
        Raises ConfigError for less than one, and after `finish`."""
        if self._finishing:
            raise ConfigError("scale after `finish`: nobody generates any more; call it before")
        self._fleet.ask(counts)

    def evaluate(self) -> None:
        """Has the idle learner's weights evaluated, unless they were, and waits until that has come in."""
        if self._finishing:
            raise ConfigError("evaluate after `finish`: nobody generates any more; call it before")
        self.ask_learner("evaluate")
        self._wait()

    def _wait(self) -> None:
        """Until the learner is idle and every evaluation asked for has come in."""
        # A learner that dies while the last evaluation runs comes back, and asks for it again.
        while self._learner.phase != "idle" or self._fresh_report().evals_pending:
            self._tick()
            self._between()
        self._until = None
        self._between()

    def halt(self) -> None:
        """Ends a `train` that was interrupted. Blocks until the learner has made and saved the update under way, for
        `limits.save_timeout_s` at most. Interrupted once more it gives that up, and `close` will wait for nobody either."""
        self._until = None
        deadline = self._clock() + self._limits.save_timeout_s
        try:
            while self._learner.phase == "running" and self._clock() < deadline:
                self._learner.handle.ask.remote("halt")
                self._tick()
            self._fresh_report()
        except AsyncRLError as error:
            log.warning("the run failed while it was being interrupted: %s", redact(str(error)))
        except KeyboardInterrupt:
            self._stop_timeout_s = 0.0
            raise

    def finish(self) -> None:
        """Settles what is outstanding and waits until generators and reward workers have ended by themselves."""
        workers = [member for member in self._members if member.role in ("generator", "reward")]
        deadline = self._clock() + self._limits.stop_timeout_s
        self._finishing, told = True, -1  # a store that restarts meanwhile has to be told again
        while any(member.phase != "ended" for member in workers) and self._clock() < deadline:
            if self._store.phase == "running" and told < self._store.restart_count:
                told = self._store.restart_count
                call_store(self._store.handle, "finish")
            self._tick()
            self._between()
        self._fresh_report()
        self._between()

    def ask_learner(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the idle learner, e.g. `save_checkpoint`. Raises Unavailable if it dies, or takes longer than
        `limits.save_timeout_s`; ConfigError while it trains."""
        self._require_idle(method)
        asked = self._learner.handle.ask.remote(method, *arguments)
        others = [rank.task for rank in self._learner.gang[1:] if rank.task is not None]  # if one ends, nobody may answer
        ended, _ = ray.wait([asked, *others], timeout=self._limits.save_timeout_s)
        try:
            return ray.get(ended[0] if ended else asked, timeout=0)
        except (RayActorError, GetTimeoutError) as error:
            raise Unavailable(f"learner: no answer to {method}: {brief(error)}") from error

    def save_soon(self) -> None:
        """Has the learner save by hand after the update under way. Waits for nothing; a learner that dies meanwhile is asked
        again."""
        self._save_after = self._summary.committed
        self._ask_save()

    def _ask_save(self) -> None:
        if self._save_after is not None:
            newest = max(map(self._plan.paths.update_of, self._plan.paths.steps()), default=0)
            if newest > self._save_after:
                self._save_after = None
            elif self._learner.phase in ("idle", "running"):
                self._learner.handle.ask.remote("save_soon")

    def restart_learner(self, checkpoint: int | None) -> None:
        """Replaces the idle learner by one that starts from `checkpoint` (None: the newest); later commits are reopened."""
        self._require_idle("load_checkpoint")
        self._plan = msgspec.structs.replace(self._plan, resume_at=checkpoint)
        if (stopped := self._learner.stop()) is not None:
            ray.wait([stopped], timeout=self._limits.stop_timeout_s)
        self._learner.kill()
        self._learner.spawn(self._plan, self._known)
        while self._learner.phase != "idle":
            self._tick()
        self._fresh_report()

    def _require_idle(self, method: str) -> None:
        if self._learner.phase != "idle":
            raise ConfigError(
                f"{method} while the learner is {self._learner.phase}: call it between two `fit`s, not in a callback"
            )

    def close(self) -> None:
        """Stops every actor: asks first, kills what has not ended after `stop_timeout_s`, or all when it is interrupted. Never
        raises for a dead one."""
        last = [self._store, *self._learner.gang[1:]]  # the others settle their last calls with them
        try:
            for group in ([member for member in self._members if member not in last], last):
                refs = [ref for member in group if (ref := member.stop()) is not None]
                refs += [member.task for member in group if member.phase == "running" and member.task is not None]
                if refs:
                    ray.wait(refs, num_returns=len(refs), timeout=self._stop_timeout_s)
        finally:
            self._fleet.release()

    # ------------------------------------------------------------------------------------------- the loop

    def _tick(self, until_told: bool = False) -> StoreReport | None:
        """One round: waits for whatever ends first, restarts what died, passes on what the actors say of themselves.

        until_told: the store's report ends the round too. Returns that report, if it has come.
        """
        tasks = {member.task: member for member in self._members if member.task is not None}
        told = [self._store.asked] if until_told and self._store.asked is not None else []
        ray.wait([*tasks, *told, *self._opening.refs], num_returns=1, timeout=TICK_S)
        with undisturbed():
            return self._look(tasks)

    def _look(self, tasks: dict[Any, Member]) -> StoreReport | None:
        """What ended, what is reported and what is due, without waiting for anything."""
        for ref in ray.wait([*tasks], num_returns=len(tasks), timeout=0)[0]:  # all of them, before anybody's deadline
            if tasks[ref].task is ref:  # else it was replaced just now, with its gang
                self._settle(tasks[ref])
        store, reports = None, []
        for member in [*self._members]:
            if member.phase == "starting" and self._clock() > member.deadline:
                self._failed(member, member.late())
            try:
                report = member.poll_report(self._limits.health_timeout_s)
            except (Unavailable, RayError) as error:  # it hangs, or is alive but broken: a full disk, a `keep` that raises
                self._failed(member, error)
                continue
            if isinstance(report, StoreReport):
                store = report
            elif report is not None:
                reports.append(report)
        if not self._finishing:
            self._scale()
        pids = {member.name: member.pid for member in self._members if member.pid}
        reports = [report for report in reports if report.name in pids]  # not of those that left in this round
        named, failing = len(self._summary.given_up), self._summary.failures.first
        self._summary.update(store, reports, self._fleet.restarts, pids)
        if (first := self._summary.failures.first) and not failing:
            log.warning("%s", redact(first))
        for message in self._summary.given_up[named:]:
            log.warning("%s", message)
            for member in filter(lambda member: member.role == "generator", self._members):
                member.budget.forgive()
        self._observe(store.records if store is not None else ())
        if self._summary.failures.broken:
            raise ConfigError(self._summary.failures.broken)
        self._watch_gang()
        if store is not None:
            self._watch(store)
        return store

    def _settle(self, member: Member) -> None:
        try:
            value = ray.get(member.task)
        except RayError as error:
            self._failed(member, error)
            return
        if member.phase == "starting":
            member.pid, member.node = value
            member.budget.up()
            self._started(member)
        elif member is self._learner:
            member.phase, member.task = "idle", None
        elif self._finishing:
            member.phase, member.task = "ended", None
        elif member.leaving:
            self._fleet.drop(member)
        else:
            self._failed(member, Unavailable(f"{member.name} ended before the run did; its log says why"))

    def _started(self, member: Member) -> None:
        log.info("%s is up (pid %d)", member.name, member.pid)
        if member is self._store:
            self._announce("store", member.restart_count, member.handle)
        if member.role == "model":
            self._announce(member.name, member.restart_count, member.handle)
        if member is not self._learner:
            member.run()
            self._tell_deaths()
            return
        self._announce("bus", member.restart_count, member.handle)
        self._plan = msgspec.structs.replace(self._plan, resume_at=None)  # a later restart takes the newest checkpoint
        member.phase, member.task = "idle", None
        self._ask_save()
        if self._until is not None:
            member.run(self._until)

    def _announce(self, peer: str, restart_count: int, value: Any) -> None:
        self._known[peer] = (restart_count, value)
        for member in self._members:
            member.connect(peer, restart_count, value)

    def _failed(self, member: Member, error: Exception) -> None:
        """Restarts the member with its gang; past max_restarts, raises with the first error of those that count. At the end of
        a run only the store is needed."""
        if (lead := member.lead) not in self._members:
            return  # it left in this round
        if self._finishing and member is not self._store:
            log.warning("%s died at the end of the run, and is not needed any more: %s", member.name, brief(error))
            lead.kill()
            return
        if member.doubts(error, self._limits.health_timeout_s):
            return
        member, error = first_failure(member, error)
        if lead.leaving or excused(lead.role, error):
            self._lost(lead, error)
            return
        text = redact(brief(error)) + gang_standing(lead, self._summary)
        counted = lead.budget.failed(text)
        if not lead.restarts:
            with suppress(DiskFull):
                write_atomic(self._plan.paths.logs / f"{member.name}.error", text + "\n")
        refuse(member, error)
        limit, window_s = self._limits.max_restarts, self._limits.restart_window_s
        if len(counted) > limit:
            raise ActorFailed(
                f"{lead.name} failed {len(counted)} times within limits.restart_window_s={window_s:g} s, "
                f"limits.max_restarts={limit}; the first error:\n{counted[0]}"
            ) from error
        lead.restarts += 1
        log.warning("%s died and is restarted: %s", member.name, text.strip().splitlines()[-1] if text.strip() else error)
        self._replace(lead, excused=False)

    def _replace(self, lead: Member, *, excused: bool) -> None:
        lead.kill()
        if lead is not self._store:
            self._dead.append((lead.name, self._plan.incarnation(lead.restart_count), excused))
            self._tell_deaths()
        lead.spawn(self._plan, self._known)

    def _lost(self, lead: Member, error: Exception) -> None:
        """Who dies while it leaves, or with its node, has not failed. Whoever comes and goes is placed anew."""
        if taken_with_its_node(error) and not lead.leaving:
            self._fleet.preemptions[lead.name] += 1
            log.warning("%s was lost with its node, which counts as no failure of its: it is replaced", lead.name)
        if lead.role in FIELDS:
            self._fleet.drop(lead)
        else:
            self._replace(lead, excused=True)

    def _scale(self) -> None:
        """Takes what was stated, or what the rule decides, and has members come and go."""
        self._scaler.look(self._summary)
        self._plan = self._fleet.look(self._plan, self._known)
        limit = self._plan.staleness.most_outstanding, self._store.restart_count
        if limit != self._limit and self._store.phase == "running":
            self._limit = limit
            call_store(self._store.handle, "limit_outstanding", limit[0])
        for name, restart_count in self._fleet.who_left():
            self._summary.reports.pop(name, None)
            self._dead.append((name, self._plan.incarnation(restart_count), True))
        self._tell_deaths()
        self._summary.preemptions = dict(self._fleet.preemptions)

    def _tell_deaths(self) -> None:
        """The store is told of every death once; of those while it was down itself, when it is up again."""
        while self._dead and self._store.phase == "running":
            call_store(self._store.handle, "forget", *self._dead.pop(0))

    # -------------------------------------------------------------------------------------- watching progress

    def _fresh_report(self) -> StoreReport:
        """What the store says to a question asked from now on; one on its way may have been asked too early."""
        if self._store.phase == "running":
            self._store.ask_report()
        while (report := self._tick(until_told=True)) is None or report.records:
            pass  # a report holds some hundred records at a time
        return report

    def _watch_gang(self) -> None:
        """Fails the learner's ranks if they are at something and none has moved for `stall_timeout_s`."""
        ranks = heard(self._learner, self._summary)
        at_work = len(ranks) > 1 and self._learner.phase != "starting" and any(report.doing for report in ranks.values())
        if self._gang_stall.stalled(None, ranks, excused=not at_work):
            limit_s = self._limits.stall_timeout_s
            self._failed(self._learner, Unavailable(f"no rank of it has moved for limits.stall_timeout_s={limit_s:g} s"))

    def _watch(self, report: StoreReport) -> None:
        """Aborts a run in which nothing has moved for `stall_timeout_s`, leaving a dump of who waits for what."""
        starting = any(member.phase == "starting" for member in self._members)  # these have a deadline of their own
        idle = self._until is None and not self._opening.refs
        doing = self._stall.stalled(report, self._summary.reports, excused=idle or starting or self._fleet.nobody)
        if doing:
            path = self._plan.paths.logs / "stall.json"
            write_atomic(path, json.dumps(redact(dump(self._members)), indent=1, default=str))
            waiting = ", ".join(f"{name}={value:g}" for name, value in report.gauges.items())
            raise AsyncRLError(
                f"nothing has moved for limits.stall_timeout_s={self._limits.stall_timeout_s:g} s: {doing} ({waiting}); "
                f"queue depths, in-flight ids and stacks are in {path}"
            )
