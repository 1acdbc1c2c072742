"""Reservations of training groups: admission, retries, and groups whose holder was lost."""

import math
from collections.abc import Iterable, Sequence

import asyncrl.replay.log.events as ev
from asyncrl.replay.ledger import StoreContext
from asyncrl.replay.plan import ticket_seed
from asyncrl.replay.state import Group
from asyncrl.types import TOO_OLD, Key, Ticket, Version


class Holders:
    """Who works on which group, and who was lost. Volatile: after a restart of the store every holder starts afresh.

    A group in flight is *lost* when its holder was silent for `lease_s`, came back as a newer incarnation, or no longer
    names it. A slow holder that names it again before it was reissued gets it back.
    """

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._ledger = context.ledger
        self._deadlines: dict[str, float] = {}
        self._lost: set[int] = set()
        self._since: dict[int, float] = {}  # when a group in flight was first seen, for the watchdog
        for group in self._ledger.in_flight():
            self._deadlines[group.worker] = self._context.lease_end()

    def renew(self, worker: str) -> None:
        if worker in self._deadlines:
            self._deadlines[worker] = self._context.lease_end()

    def arrive(self, caller: Key, held: Sequence[int]) -> None:
        """A holder reports what it still works on: once per call, however long that waits."""
        self._deadlines[caller.worker] = self._context.lease_end()
        groups, now = self._ledger.in_flight(), self._context.clock()
        self._since = {g.id: self._since.get(g.id, now) for g in groups}
        theirs = [g for g in groups if g.worker == caller.worker]
        kept = {g.id for g in theirs if g.incarnation == caller.incarnation}.intersection(held)
        self._lost -= kept
        self._lose(g.id for g in theirs if g.id not in kept)

    def forget(self, worker: str, incarnation: int) -> None:
        """Takes what a worker held up to this incarnation as lost."""
        self._lose(g.id for g in self._ledger.in_flight() if g.worker == worker and g.incarnation <= incarnation)

    def expire(self) -> None:
        """Takes what silent workers held as lost."""
        now = self._context.clock()
        silent = {worker for worker, deadline in self._deadlines.items() if deadline <= now}
        for worker in silent:
            del self._deadlines[worker]
        if silent:
            self._lose(g.id for g in self._ledger.in_flight() if g.worker in silent)

    def _lose(self, groups: Iterable[int]) -> None:
        before = len(self._lost)
        self._lost.update(groups)
        self._context.changes += len(self._lost) > before

    def next_deadline(self) -> float:
        """When the next worker counts as silent; infinite if there is none."""
        return min(self._deadlines.values(), default=math.inf)

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

    def holds(self, caller: Key, group: int) -> bool:
        """Whether this caller still is the holder of a wanted group."""
        found = self._ledger.find(group)
        mine = found is not None and (found.worker, found.incarnation) == (caller.worker, caller.incarnation)
        return mine and group not in self._lost

    def reissue(self, group: Group, caller: Key, version: Version) -> Ticket:
        attempt, update = group.attempt + 1, version.update
        self._context.record(ev.GroupReissued(group.id, attempt, update, caller.worker, caller.incarnation))
        self._lost.discard(group.id)
        return ticket(self._context, group)


class Admission:
    """Hands out training tickets within the bound."""

    def __init__(self, context: StoreContext, holders: Holders) -> None:
        self._context = context
        self._ledger = context.ledger
        self._rule = context.plan.rule
        self._holders = holders

    def tickets(self, k: int, caller: Key, version: Version, held: Sequence[int]) -> list[Ticket]:
        """Up to k tickets: lost groups first, then retries, then new prompts."""
        tickets = self._reissues(k, caller, version, held)
        for _ in range(min(k - len(tickets), self._room(version))):
            if self._context.exhausted():
                break
            tickets.append(self._reserve(caller, version))
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

    def _room(self, version: Version) -> int:
        ledger = self._ledger
        return self._rule.room(outstanding=len(ledger.groups), committed=ledger.committed, update=self._update(version))

    def _reissues(self, k: int, caller: Key, version: Version, held: Sequence[int]) -> list[Ticket]:
        ledger = self._ledger
        tickets: list[Ticket] = []
        for group in self._holders.lost():
            # A caller that still works on the lost attempt must first hear that it is cancelled.
            if len(tickets) >= k or group.purpose == "eval" or group.id in held:
                continue
            position = ledger.position(group.id)
            if self._rule.reissuable(position=position, committed=ledger.committed, update=self._update(version)):
                tickets.append(self._holders.reissue(group, caller, version))
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
