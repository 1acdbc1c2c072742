"""One actor slot under supervision: spawned, watched, replaced when it dies, until its restarts are used up."""

import logging
import time
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError

from asyncrl.cluster.actors import StageActor, StoreActor
from asyncrl.cluster.placement import Placement, beside_driver, reserve
from asyncrl.cluster.plan import RunPlan
from asyncrl.config import PlaceSpec
from asyncrl.errors import Unavailable
from asyncrl.interfaces import VERBS
from asyncrl.types import Report

log = logging.getLogger(__name__)
Phase = Literal["starting", "idle", "running", "ended"]


class Member:
    """A named slot. `restart_count` numbers the actors that filled it, `restarts` counts those that failed; `task` is the Ray
    reference that ends with its phase."""

    def __init__(self, role: str, name: str, place: PlaceSpec) -> None:
        self.role, self.name, self.place = role, name, place
        self.restart_count = -1
        self.phase: Phase = "ended"
        self.pid = 0
        self.handle: Any = None
        self.task: Any = None
        self.restarts = 0
        self.first_error = ""
        self.last_report: Report | None = None
        self._placement: Placement | None = None
        self._asked: Any = None
        self._asked_at = 0.0

    def spawn(self, plan: RunPlan, known: dict[str, tuple[int, Any]]) -> None:
        """Creates the actor and begins `start`. `known` are the peers announced so far."""
        limits = plan.deployment.limits
        if self._placement is None:
            here = self.role == "store"
            self._placement = beside_driver() if here else reserve(self.name, self.place, limits.start_timeout_s)
        self.restart_count += 1
        self.phase, self._asked = "starting", None
        if self.role == "store":
            actor = ray.remote(concurrency_groups={verb.caller: 1000 for verb in VERBS.values()})(StoreActor)
            self.handle = actor.options(**self._placement.options).remote(plan)
        else:
            options = {**self._placement.options, "max_concurrency": 8}
            self.handle = (
                ray.remote(StageActor)
                .options(**options)
                .remote(self.role, self.name, self.restart_count, plan, self.place.threads)
            )
            for peer, (restart_count, value) in known.items():
                self.connect(peer, restart_count, value)
        self.task = self.handle.start.remote()

    def connect(self, peer: str, restart_count: int, value: Any) -> None:
        if self.role != "store" and self.phase != "ended":
            self.handle.connect.remote(peer, restart_count, value)

    def run(self, *arguments: Any) -> None:
        self.phase, self.task = "running", self.handle.run.remote(*arguments)

    def poll_report(self, timeout_s: float) -> None:
        """Takes the report asked for last time, if it has come, and asks for the next. Never waits.

        Raises Unavailable for an actor that has not answered for `timeout_s`, what its health check raised, and RayActorError
        for one that died while it had nothing to do.
        """
        if self.role == "store" or self.phase not in ("idle", "running"):
            return
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                if (silent_s := time.monotonic() - self._asked_at) > timeout_s:
                    raise Unavailable(f"{self.name} (pid {self.pid}) has not answered for {silent_s:.0f} s")
                return
            try:
                self.last_report = ray.get(self._asked)
            except RayActorError:
                if self.task is None:
                    raise
                log.debug("%s: no report", self.name)  # its death arrives through `task`
        self._asked, self._asked_at = self.handle.report.remote(), time.monotonic()

    def stop(self) -> Any:
        """Asks the actor to end; returns the reference to wait on, or None."""
        return self.handle.stop.remote() if self.handle is not None and self.phase != "ended" else None

    def kill(self) -> None:
        """Ends the process, however it stands."""
        if self.handle is not None:
            ray.kill(self.handle, no_restart=True)
        self.phase, self.task = "ended", None

    def release(self) -> None:
        self.kill()
        if self._placement is not None:
            self._placement.release()
            self._placement = None
