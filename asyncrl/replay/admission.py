"""Reservations of training groups: admission, retries, and groups whose holder was lost."""

import math
from collections.abc import Iterable, Mapping, Sequence

import asyncrl.replay.log.events as ev
from asyncrl.replay.ledger import StoreContext
from asyncrl.replay.plan import ticket_seed
from asyncrl.replay.state import Group
from asyncrl.report.timing import TimeInState
from asyncrl.types import TOO_OLD, Key, Ticket, Version


class Holders:
    """Who works on which group, and who was lost. Volatile: after a restart of the store every holder starts afresh.

    A group in flight is *lost* when its holder was silent for `lease_s`, came back as a newer incarnation, or no longer
    names it. Nobody waits for it then: but for the rollouts that it has, it counts in no deadline. A slow holder that names it
    again before it was reissued gets it back, if the bound still holds with it.
    """

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._ledger = context.ledger
        self._rule = context.plan.rule
        self._lease_ends: dict[str, float] = {}
        self._lost: set[int] = set()
        self._since: dict[int, float] = {}  # when a group in flight was first seen, for the watchdog
        for group in self._ledger.in_flight():
            self._lease_ends[group.worker] = self._context.lease_end()
        # Groups that were lost before counted in no deadline, so that counting them again may break the bound.
        self._lost.update(group.id for group in self.misfits() if group.in_flight())

    def renew(self, worker: str) -> None:
        if worker in self._lease_ends:
            self._lease_ends[worker] = self._context.lease_end()

    def arrive(self, caller: Key, held: Sequence[int]) -> None:
        """A holder reports what it still works on: once per call, however long that waits."""
        self._lease_ends[caller.worker] = self._context.lease_end()
        groups, now = self._ledger.in_flight(), self._context.clock()
        self._since = {g.id: self._since.get(g.id, now) for g in groups}
        theirs = [g for g in groups if g.worker == caller.worker]
        named = [g for g in theirs if g.incarnation == caller.incarnation and g.id in held]
        for group in named:
            self.regain(group)
        kept = {group.id for group in named}
        self._lose(g.id for g in theirs if g.id not in kept)

    def forget(self, worker: str, incarnation: int) -> None:
        """Takes what a worker held up to this incarnation as lost."""
        self._lose(g.id for g in self._ledger.in_flight() if g.worker == worker and g.incarnation <= incarnation)

    def expire(self) -> None:
        """Takes what silent workers held as lost."""
        now = self._context.clock()
        silent = {worker for worker, deadline in self._lease_ends.items() if deadline <= now}
        for worker in silent:
            del self._lease_ends[worker]
        if silent:
            self._lose(g.id for g in self._ledger.in_flight() if g.worker in silent)

    def regain(self, group: Group) -> bool:
        """Whether a group is not lost, or is no longer, because its holder is heard of and the bound still holds with it."""
        free = group.purpose == "eval" or not self._rule.holds
        if group.id in self._lost and (free or self.fits(group, group.oldest())):
            self._lost.discard(group.id)
        return group.id not in self._lost

    def _lose(self, groups: Iterable[int]) -> None:
        before = len(self._lost)
        self._lost.update(groups)
        self._context.changes += len(self._lost) > before

    def next_deadline(self) -> float:
        """When the next worker counts as silent; infinite if there is none."""
        return min(self._lease_ends.values(), default=math.inf)

    def age_s(self, group: int) -> float:
        """For how long a group has been in flight, as far as its holder has reported since."""
        now = self._context.clock()
        return now - self._since.get(group, now)

    def is_lost(self, group: int) -> bool:
        return group in self._lost

    def lost(self) -> list[Group]:
        """Lost groups that are still wanted, oldest first."""
        found = [(g, self._ledger.find(g)) for g in sorted(self._lost)]
        wanted = [group for _, group in found if group is not None and group.in_flight()]
        self._lost = {group.id for group in wanted}
        return wanted

    def deadline(self, group: Group) -> float:
        """How many updates may be committed before a group is in a batch; inf where nobody waits for it."""
        oldest = group.oldest_submitted() if group.id in self._lost else group.oldest()
        return math.inf if oldest is None or group.given_up else self._rule.deadline(oldest)

    def fits(self, group: Group, oldest: int, others: Mapping[int, int] = {}) -> bool:
        """Whether tokens from update `oldest` may become a part of a group that is in no batch: they can be trained in time;
        and, where the rule holds, so can every group. others: updates of tokens that are about to become a part of those."""
        rule, committed = self._rule, self._ledger.planned
        if group.given_up or not rule.holds:
            return rule.deadline(oldest) >= committed
        deadlines = {g.id: self.deadline(g) for g in self._ledger.untaken()}
        for coming, update in {**others, group.id: oldest}.items():
            deadlines[coming] = min(deadlines[coming], rule.deadline(update))
        return rule.feasible(deadlines.values(), committed)

    def misfits(self) -> list[Group]:
        """The fewest groups without which all others can be trained in time: none, but where a run is resumed with a smaller
        max_lag, or groups were lost before the store restarted."""
        untaken, rule = self._ledger.untaken(), self._rule
        if not rule.holds or rule.feasible(map(self.deadline, untaken), self._ledger.planned):
            return []
        fresh_first = sorted(untaken, key=lambda g: (g.in_flight(), -self.deadline(g)))
        found = rule.misfits(((g.id, self.deadline(g)) for g in fresh_first), self._ledger.planned)
        return [self._ledger.groups[group] for group in found]

    def holds(self, caller: Key, group: int) -> bool:
        """Whether this caller still is the holder of a wanted group."""
        found = self._ledger.find(group)
        mine = found is not None and (found.worker, found.incarnation) == (caller.worker, caller.incarnation)
        return mine and group not in self._lost

    def reissue(self, group: Group, caller: Key, update: int) -> Ticket:
        """update: of the caller's weights, as far as they count."""
        self._context.record(ev.GroupReissued(group.id, group.attempt + 1, update, caller.worker, caller.incarnation))
        self._lost.discard(group.id)
        return ticket(self._context, group)


class Admission:
    """Hands out training tickets within the bound."""

    def __init__(self, context: StoreContext, holders: Holders) -> None:
        self._context = context
        self._ledger = context.ledger
        self._rule = context.plan.rule
        self._holders = holders
        self.time = TimeInState("free", context.clock)  # what keeps callers with free slots from more work, if anything does

    def tickets(self, k: int, caller: Key, version: Version, held: Sequence[int]) -> list[Ticket]:
        """Up to k tickets: lost groups first, then retries, then new prompts."""
        tickets = self._reissues(k, caller, version, held)
        for _ in range(min(k - len(tickets), self._room(version))):
            if self._context.exhausted():
                break
            tickets.append(self._reserve(caller, version))
        self.time.enter(self._limit(version) if len(tickets) < k else "free")
        return tickets

    def waiting_for(self, version: Version) -> str:
        """Why a caller at `version` gets no ticket now."""
        if self._context.exhausted():
            return "data"
        newest = Version(self._ledger.incarnation, max(self._update(version), self._ledger.committed))
        if self._room(version) <= 0 < self._room(newest):
            return TOO_OLD
        return "bound full"

    def _update(self, version: Version) -> int:
        """The update that admission counts with. Weights of a lost lineage may be ahead of the restored one, but their
        holder is about to fall back to it."""
        ledger = self._ledger
        return version.update if version.incarnation == ledger.incarnation else min(version.update, ledger.committed)

    def _limit(self, version: Version) -> str:
        """What keeps a caller at `version` from more work."""
        if self._context.exhausted():
            return "data"
        return "max_lag" if self._within_bound(version) <= self._within_reserve() else "reserve_ahead"

    def _room(self, version: Version) -> int:
        return min(self._within_bound(version), self._within_reserve())

    def _within_bound(self, version: Version) -> int:
        ledger = self._ledger
        untaken = len(ledger.groups) - len(ledger.taken)
        return self._rule.room(untaken=untaken, committed=ledger.planned, update=self._update(version))

    def _within_reserve(self) -> int:
        return self._rule.most_outstanding - len(self._ledger.groups)

    def _reissues(self, k: int, caller: Key, version: Version, held: Sequence[int]) -> list[Ticket]:
        update = self._update(version)
        tickets: list[Ticket] = []
        for group in self._holders.lost():
            # A caller that still works on the lost attempt must first hear that it is cancelled.
            if len(tickets) >= k or group.purpose == "eval" or group.id in held:
                continue
            if self._holders.fits(group, update):
                tickets.append(self._holders.reissue(group, caller, update))
        return tickets

    def _reserve(self, caller: Key, version: Version) -> Ticket:
        ledger, plan = self._ledger, self._context.plan
        position, retry = ledger.retries[0] if ledger.retries else (ledger.cursor, 0)
        group, n, update = ledger.next_group, plan.sampling.n, self._update(version)
        self._context.record(
            ev.GroupReserved(group, "train", position, retry, n, update, caller.worker, caller.incarnation, plan.baseline)
        )
        return ticket(self._context, ledger.groups[group])


def ticket(context: StoreContext, group: Group) -> Ticket:
    """The ticket for what a group still misses."""
    source = context.plan.source
    if group.purpose == "eval":
        assert context.plan.evaluation is not None
        assert context.ledger.round is not None
        prompt, sampling = context.plan.evaluation.prompts[group.position], context.plan.evaluation.sampling
        pinned = context.ledger.round.version
    else:
        prompt, sampling, pinned = source.prompts[source.index(group.position)], source.sampling, None
    missing = group.missing()
    return Ticket(
        group=group.id,
        attempt=group.attempt,
        prompt=prompt,
        rollouts=missing,
        seeds=tuple(ticket_seed(source.seed, group.purpose, group.position, group.retry, r) for r in missing),
        sampling=sampling,
        purpose=group.purpose,
        pinned=pinned,
        baseline=None if group.baseline() is None else group.n,
    )
