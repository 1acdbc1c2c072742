"""One actor slot under supervision: spawned, watched, replaced when it dies, until its restarts are used up.

Slots that can't do without each other are a gang: they start together, and where one fails all are replaced.
"""

from collections.abc import Sequence
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from asyncrl.cluster.actors import StageActor, StoreActor
from asyncrl.cluster.placement import Placement, beside_driver, fits_nowhere, request, reserve
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.transport import ANSWERS, call_store
from asyncrl.cluster.watchdog import Clock, RestartBudget
from asyncrl.config import QUESTIONS, LimitsSpec, PlaceSpec
from asyncrl.errors import AsyncRLError, Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.types import Report, StoreReport

FALLBACK_S = 60.0  # for which a place is sought by some labels, before it is by the next: a node may take so long to join
Phase = Literal["starting", "idle", "running", "ended"]
# Calls of one kind that the store has at a time: a `submit` must not queue behind the generators that wait in `reserve`.
STORE_GROUPS = {verb.caller: 100_000 for verb in VERBS.values()}


class Member:
    """A named slot, and the actor that fills it now. clock: seconds, as the supervisor counts them.

    leads: the other slots of its gang. What concerns the gang, starts and restarts, is this one's; each of them knows it as
    its `lead`, which of any other slot is itself.
    """

    def __init__(
        self, role: str, name: str, place: PlaceSpec, limits: LimitsSpec, clock: Clock, leads: "Sequence[Member]" = ()
    ) -> None:
        self.take_lead(leads)
        self.role, self.name, self.place = role, name, place
        self.restart_count = -1  # numbers the actors that filled it, replaced ones too
        self.restarts = 0  # counts those of them that failed
        self.budget = RestartBudget(max(limits.restart_window_s, (limits.max_restarts + 1) * limits.start_timeout_s), clock)
        self.phase: Phase = "ended"
        self.task: Any = None  # Ray's reference that ends with the phase; None while the actor is idle or gone
        self.deadline = 0.0  # by which `start` must have ended, on the clock
        self.pid, self.node = 0, ""  # of the actor that is up; Ray's id of the node
        self.leaving = ""  # why it is given up: it finishes what it holds, and is not replaced
        self.leave_by = 0.0  # on the clock; past it, others do that
        self.handle: Any = None
        self.asked: Any = None  # Ray's reference to the report that was asked for
        self._clock = clock
        self._asked_at = 0.0
        self._doubted_at: float | None = None  # since when it can't be reached, and nobody knows why
        self._seen = 0  # sequence number of the newest record that the store reported
        self._placement: Placement | None = None
        self._choice, self._sought_at = 0, 0.0

    def take_lead(self, others: "Sequence[Member]") -> None:
        """From now on its gang is itself and the others."""
        self.lead, self.gang = self, (self, *others)
        for member in others:
            member.lead = self

    @property
    def places(self) -> list[PlaceSpec]:
        """Of its gang."""
        return [member.place for member in self.gang]

    def seek(self) -> None:
        """Asks for the places of its gang, for a `spawn` that waits for none: when it is `placed`."""
        self._placement, self._choice = request(self.name, self.places), 0
        self._sought_at = self._clock()

    def placed(self) -> bool:
        """Whether the places that it seeks are there; labels of the place are asked for in turn."""
        if self._placement is None or self._placement.ready:
            return True
        now, choices = self._clock(), len(self.place.choices)
        if choices > 1 and now - self._sought_at > FALLBACK_S:
            self._placement.release()
            self._choice, self._sought_at = (self._choice + 1) % choices, now
            self._placement = request(self.name, self.places, self._choice)
        return False

    def leave(self, why: str, within_s: float) -> None:
        """Has the actor finish what it holds, and end; for so many seconds at the most."""
        self.leaving, self.leave_by = why, self._clock() + within_s
        if self.phase == "running":
            self.handle.ask.remote("retire")

    @property
    def is_store(self) -> bool:
        return self.role == "store"

    def spawn(self, plan: RunPlan, known: dict[str, tuple[int, Any]], *, patient: bool = False) -> None:
        """Creates the actors of the gang that it leads, and begins their `start`. `known` are the peers announced so far.
        patient: where no place was sought, one is waited for although no node has room yet."""
        timeout_s = plan.deployment.limits.start_timeout_s
        self.leaving = ""
        if self._placement is None:
            own = beside_driver() if self.is_store else None
            self._placement = own or reserve(self.name, self.places, timeout_s, patient=patient)
        for member, options in zip(self.gang, self._placement.options, strict=True):
            member._create(plan, known, options)
        followers = [member.handle for member in self.gang[1:]]
        for member in self.gang:
            arguments = (followers,) if member is self and followers else ()
            member.task, member.deadline = member.handle.start.remote(*arguments), self._clock() + timeout_s

    def _create(self, plan: RunPlan, known: dict[str, tuple[int, Any]], options: dict[str, Any]) -> None:
        self.restart_count += 1
        self.phase, self.asked, self._doubted_at = "starting", None, None
        if self.is_store:
            actor = ray.remote(concurrency_groups=STORE_GROUPS)(StoreActor)
            self.handle = actor.options(**options).remote(plan)
            return
        # A model is asked by more reward workers than that once they were scaled further: what waits holds up no report.
        groups = {ANSWERS: QUESTIONS * plan.deployment.rewards.most} if self.role == "model" else None
        actor = ray.remote(max_concurrency=8, concurrency_groups=groups)(StageActor)
        self.handle = actor.options(**options).remote(self.role, self.name, self.restart_count, plan, self.place.threads)
        for peer, (restart_count, value) in known.items():
            self.connect(peer, restart_count, value)

    def late(self) -> AsyncRLError:
        """What is said of it past its deadline. The place of one that is started again may have gone with its node."""
        if self.lead._placement is not None and not self.lead._placement.ready:
            return fits_nowhere(self.lead.name, self.lead.places)
        return Unavailable(f"{self.name} did not start within limits.start_timeout_s")

    def connect(self, peer: str, restart_count: int, value: Any) -> None:
        """Tells the actor where a peer is now; the store asks nobody."""
        if not self.is_store and self.phase != "ended":
            self.handle.connect.remote(peer, restart_count, value)

    def run(self, *arguments: Any) -> None:
        self.phase, self.task = "running", self.handle.run.remote(*arguments)

    def doubts(self, error: Exception, within_s: float) -> bool:
        """Whether it is too early to tell why the actor failed: one whose node died is out of reach at first, and the cluster
        knows some seconds later. It is then asked for reports until it is known, within_s at the most."""
        if self.is_store or self.lead.gang[1:] or not isinstance(error, ActorUnavailableError):
            return False  # ranks of a gang would meanwhile fail of each other
        if self._doubted_at is None:
            self._doubted_at = self._clock()
        if self._clock() - self._doubted_at > within_s:
            return False
        self.task = None
        self.ask_report()
        return True

    def ask_report(self) -> None:
        """Asks for a report as of now; one on its way is forgotten."""
        self.asked = call_store(self.handle, "report", self._seen) if self.is_store else self.handle.report.remote()
        self._asked_at = self._clock()

    def poll_report(self, timeout_s: float) -> Report | StoreReport | None:
        """Returns the report asked for last time, if it has come, and asks for the next. Never waits.

        Raises Unavailable for an actor that has not answered for `timeout_s`, or that was out of reach; what its health check
        raised; and RayActorError for one that died while it had nothing to do, or is in doubt. Other deaths arrive through
        `task`.
        """
        if self.phase not in ("idle", "running") and self._doubted_at is None:
            return None
        report: Report | StoreReport | None = None
        if self.asked is not None:
            if not ray.wait([self.asked], timeout=0)[0]:
                if (silent_s := self._clock() - self._asked_at) > timeout_s:
                    raise Unavailable(f"{self.name} (pid {self.pid}) has not answered for {silent_s:.0f} s")
                return None
            try:
                report = ray.get(self.asked)
            except RayActorError:
                if self.task is None:
                    raise
            else:
                if self._doubted_at is not None:
                    raise Unavailable(f"{self.name} was out of reach for a while, and what it does since is not known")
        if isinstance(report, StoreReport):
            self._seen = max([self._seen, *(record.sequence for record in report.records)])
        self.ask_report()
        return report

    def stop(self) -> Any:
        """Asks the actor to end; returns the reference to wait on, or None."""
        return self.handle.stop.remote() if self.handle is not None and self.phase != "ended" else None

    def kill(self) -> None:
        """Ends the processes of the gang that it leads, however they stand."""
        self.budget.down()
        for member in self.gang:
            if member.handle is not None:
                ray.kill(member.handle, no_restart=True)
            member.phase, member.task, member.pid, member.node = "ended", None, 0, ""

    def release(self) -> None:
        self.kill()
        if self._placement is not None:
            self._placement.release()
            self._placement = None
