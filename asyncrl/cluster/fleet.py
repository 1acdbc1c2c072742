"""Who belongs to a run now: its members, of which generators, reward workers and ranks come and go while it runs.

    wanted more ──► seeks a place ──► placed: spawned as the others
    wanted less, its node drains ──► leaves: reserves no more, finishes what it holds ──► left: its place is released
    another number of ranks, or the node of one drains ──► the learner halts: the update under way is saved ──► its places are
    released, others sought
A member that left is kept by name: who gets the name next has a higher incarnation.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from msgspec.structs import replace
from ray.exceptions import ActorDiedError

from asyncrl.cluster.fit import fit_layouts
from asyncrl.cluster.members import FALLBACK_S, Member
from asyncrl.cluster.placement import fits_nowhere
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.resources import check_placement
from asyncrl.cluster.watchdog import Clock
from asyncrl.config import CountRange, Deployment, PlaceSpec
from asyncrl.errors import ConfigError

log = logging.getLogger(__name__)
FIELDS = {"generator": "generators", "reward": "rewards"}  # the roles that come and go, and what a deployment calls them
_DRAINS_EVERY_S = 2.0  # between two looks at which nodes drain
_MARGIN_S = 2.0  # before a draining node goes


class Fleet:
    """The members of one run. `members` is one list, always, of those that have an actor."""

    def __init__(self, plan: RunPlan, clock: Clock) -> None:
        self._recipe, self._deployment, self._clock, self._loopback = plan.recipe, plan.deployment, clock, plan.loopback
        self._limits = plan.deployment.limits
        self._specs = {role: getattr(plan.deployment, field) for role, field in FIELDS.items()}
        self.counts = {role: spec.least for role, spec in self._specs.items()}  # how many there should be
        self._fewest = dict(self.counts)  # with fewer than these the run does not go on
        self.counts["learner"] = plan.deployment.learner.ranks  # of its policy
        self._halting = self._seeking = False  # the learner, for other ranks or other nodes
        self._ranks_before, self._sought_at = 0, 0.0
        self.elastic = {role: spec.count for role, spec in self._specs.items() if isinstance(spec.count, CountRange)}
        self.coming: list[Member] = []  # who seeks a place
        self.left: list[tuple[str, int]] = []  # whom the supervisor has to tell the store of, and their restart counts
        self.preemptions: Counter[str] = Counter()  # actors that were lost, or given up, with their node, by name
        self._gone: dict[str, Member] = {}
        self._asked: dict[str, tuple[int, str]] = {}  # counts by role, and why; by `ask`, from any thread
        self._drains_at, self._drains = 0.0, dict[str, int]()  # nodes: by when, in milliseconds since the epoch; 0: none said
        self._short_since: dict[str, float] = {}  # roles with fewer than the fewest
        self.members = self._first(plan)

    def _first(self, plan: RunPlan) -> list[Member]:
        deployment, watch = plan.deployment, (self._limits, self._clock)
        learner = Member("learner", "learner", deployment.learner.place, *watch, self._ranks(deployment))
        store = Member("store", "store", deployment.store.place, *watch)
        models = [Member("model", name, deployment.rewards.models.place, *watch) for name in plan.models]
        come = [self._member(role, f"{role}-{i}", self._specs[role].place) for role in FIELDS for i in range(self.counts[role])]
        return [store, *learner.gang, *come, *models]

    def _ranks(self, deployment: Deployment) -> list[Member]:
        """All of the learner's but the first."""
        _, *others = deployment.ranks.items()
        return [self._member("rank", name, deployment.groups[group].place) for name, group in others]

    def _member(self, role: str, name: str, place: PlaceSpec) -> Member:
        return self._gone.pop(name, None) or Member(role, name, place, self._limits, self._clock)

    @property
    def restarts(self) -> dict[str, int]:
        """Of the actors that had any, those that left included."""
        all_ = (*self.members, *self.coming, *self._gone.values())
        return {member.name: member.restarts for member in all_ if member.restarts}

    def ask(self, counts: dict[str, int | None]) -> None:
        """States how many of a role there should be from now on, whatever the deployment says; of the learner, ranks of its
        policy. From any thread. Raises ConfigError for what can't be."""
        stated = {role: count for role, count in counts.items() if count is not None}
        for role, field in FIELDS.items():
            if (count := stated.get(role, 1)) < 1:
                raise ConfigError(f"scale: {field}={count} < 1: nobody would be left to do that; use at least 1")
            if role == "generator" and count > 1 and self._specs[role].engine.sglang.urls:
                raise ConfigError(
                    f"scale: generators={count} with engine.sglang.urls: every generator would update the same servers; it "
                    "stays one"
                )
        if "learner" in stated:
            wanted = with_counts(self._deployment, self.counts | stated).with_ranks(stated["learner"])
            check_placement(wanted, served=len(self._recipe.reward.served))
            fit_layouts(self._recipe, wanted)  # what the ranks can hold they look at themselves when they start
        self._asked |= {role: (count, "it was asked for") for role, count in stated.items()}

    def asked(self) -> list[tuple[str, int, str]]:
        """What was stated since, and why, if it differs from what there should be. A role is then no longer the rule's."""
        found = []
        while self._asked:
            role, (count, why) = self._asked.popitem()
            self.elastic.pop(role, None)
            self._fewest[role] = 1
            if count != self.counts[role]:
                found.append((role, count, why))
        return found

    def at_work(self, role: str) -> int:
        """How many are up."""
        return sum(member.phase == "running" and not member.leaving for member in self._of(role))

    @property
    def nobody(self) -> bool:
        """Whether a role waits for places, and nobody of it is up."""
        return self._seeking or any(not self.at_work(member.role) for member in self.coming)

    def _of(self, role: str) -> list[Member]:
        return [member for member in self.members if member.role == role]

    def look(self, plan: RunPlan, known: dict[str, tuple[int, Any]]) -> RunPlan:
        """Has as many come or go as `counts` say, and those go whose node does; spawns those that got a place. Returns the plan
        for whoever starts from now on. Raises PlacementError where fewer than the fewest had a place for too long."""
        for member, left_s in self._drained():
            self.preemptions[member.name] += 1
            self.lose(member, "its node drains", min(left_s, self._limits.leave_timeout_s))
        for role in FIELDS:
            self._fill(role)
        plan = self._regroup(plan, known)
        for member in [member for member in self.members if member.leaving and self._clock() > member.leave_by]:
            log.warning("%s still held work when its time was over: others begin it anew", member.name)
            self.drop(member)
        plan = replace(plan, deployment=with_counts(plan.deployment, self.counts))
        for role in FIELDS:
            if sum(not member.leaving for member in self._of(role)) < self._fewest[role]:
                self._short_since.setdefault(role, self._clock())
            else:
                self._short_since.pop(role, None)
        for member in [*self.coming]:
            if member.placed():
                self.coming.remove(member)
                self.members.append(member)
                member.spawn(plan, known)
            elif self._clock() - self._short_since.get(member.role, math.inf) > self._limits.start_timeout_s:
                raise fits_nowhere(member.name, [member.place])
        return plan

    def _regroup(self, plan: RunPlan, known: dict[str, tuple[int, Any]]) -> RunPlan:
        """Has the learner's policy be on as many ranks as it should, and on none of the nodes that drain. It goes on from the
        checkpoint with which it halts; one that dies instead, from its newest. Where no room is found for another number of
        ranks, they are as many as they were; for as many, PlacementError."""
        learner, count = self.members[1], self.counts["learner"]
        same, drained = count == plan.deployment.learner.ranks, any(member.node in self._drains for member in learner.gang)
        if self._seeking and learner.placed():
            self._seeking = False
            learner.spawn(plan, known)
        elif self._seeking and same:
            self._fall_back(learner, count)
        told = self._halting and learner.phase in ("running", "idle")  # to halt: there is no way back
        if same and not drained and not told:
            self._halting = False
            return plan
        if learner.phase == "idle" and not self._halting:
            return plan  # not before the next update
        if learner.phase == "running":
            self._halting = True
            learner.handle.ask.remote("halt")
            return plan
        if drained:
            self.preemptions["learner"] += 1
            log.info("the learner goes on elsewhere: a node of its drains")
        if learner.phase == "idle" and (stopped := learner.stop()) is not None:
            ray.wait([stopped], timeout=self._limits.stop_timeout_s)
        return self._seek_ranks(plan, count)

    def _fall_back(self, learner: Member, count: int) -> None:
        waited_s = self._clock() - self._sought_at
        if count == self._ranks_before:
            if waited_s > self._limits.start_timeout_s:
                raise fits_nowhere(learner.name, learner.places)
        elif waited_s > FALLBACK_S * len(learner.place.choices):
            self._asked["learner"] = self._ranks_before, f"there was no room for {count} in {waited_s:.0f} s"

    def _seek_ranks(self, plan: RunPlan, count: int) -> RunPlan:
        """Gives the learner's places back and asks for others. Returns the plan for whoever starts from now on."""
        learner = self.members[1]
        if not self._seeking:
            self._ranks_before = plan.deployment.learner.ranks
        self._halting, self._seeking, self._sought_at = False, True, self._clock()
        plan = replace(plan, deployment=plan.deployment.with_ranks(count))
        learner.release()
        _, *others = before = learner.gang
        self._gone |= {member.name: member for member in others}
        self.left += [(member.name, member.restart_count) for member in others]
        learner.take_lead(self._ranks(plan.deployment))
        self.members[1 : 1 + len(before)] = learner.gang
        learner.seek()
        return plan

    def _fill(self, role: str) -> None:
        coming = [member for member in self.coming if member.role == role]
        staying = [member for member in self._of(role) if not member.leaving]
        surplus = len(coming) + len(staying) - self.counts[role]
        for _ in range(-surplus):
            taken = {member.name for member in (*self.coming, *self.members)}
            number = next(number for number in range(len(taken) + 1) if f"{role}-{number}" not in taken)
            self.coming.append(self._member(role, f"{role}-{number}", self._specs[role].place))
            self.coming[-1].seek()
        for member in coming[::-1][: max(0, surplus)]:
            member.release()
            self.coming.remove(member)
            self._gone[member.name] = member
        staying.sort(key=lambda member: (member.phase == "starting", int(member.name.rpartition("-")[2])))
        for member in staying[len(staying) - max(0, surplus - len(coming)) :]:
            self.lose(member, "fewer are wanted", self._limits.leave_timeout_s)

    def lose(self, member: Member, why: str, within_s: float) -> None:
        """Has a member leave: one that is up when it has finished what it holds, any other at once."""
        log.info("%s leaves: %s", member.name, why)
        member.leave(why, within_s)
        if member.phase != "running":
            self.drop(member)

    def drop(self, member: Member) -> None:
        """A member has left: what it still held is another's, and its place is given back."""
        member.leaving = member.leaving or "it is gone"
        member.release()
        self.members.remove(member)
        self._gone[member.name] = member
        self.left.append((member.name, member.restart_count))  # the name may have a successor before that is told

    def who_left(self) -> Iterator[tuple[str, int]]:
        """Those of whom this has not told yet."""
        while self.left:
            yield self.left.pop()

    def _drained(self) -> Iterator[tuple[Member, float]]:
        """Which of those that come and go is on a node that drains, and for how many seconds it will be there."""
        if self._loopback or self._clock() < self._drains_at:
            return
        self._drains_at = self._clock() + _DRAINS_EVERY_S
        self._drains = ray._private.state.state.get_draining_nodes()
        for member in [member for member in self.members if member.node in self._drains and not member.leaving]:
            until = self._drains[member.node] / 1000
            if member.role in FIELDS:
                yield member, max(0.0, until - time.time() - _MARGIN_S) if until else float("inf")

    def release(self) -> None:
        """Ends every actor, and gives all places back."""
        for member in (*self.members, *self.coming):
            member.release()


def with_counts(deployment: Deployment, counts: Mapping[str, int]) -> Deployment:
    """The same with so many of the roles that come and go."""
    for role, field in FIELDS.items():
        if (spec := getattr(deployment, field)).least != (count := counts[role]):
            spec = replace(spec, count=CountRange(min=count, max=max(count, spec.most)))  # models have room for the most
            deployment = replace(deployment, **{field: spec})
    return deployment


def taken_with_its_node(error: Exception) -> bool:
    """Whether an actor died because its node did, or was preempted: a reason, and no failure of the actor."""
    return isinstance(error, ActorDiedError) and (error.preempted or "its node has died" in str(error))


def excused(role: str, error: Exception) -> bool:
    """Whether who died of this has not failed: its node did. A learner's node may have died of what the learner did, unless
    that was announced, or it had not begun: a node may be placed on for some seconds after its death."""
    announced = isinstance(error, ActorDiedError) and bool(error.preempted)
    innocent = role != "learner" or "The actor never ran" in str(error)
    return announced or (innocent and taken_with_its_node(error))
