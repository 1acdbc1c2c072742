"""Reservations of training groups: admission, retries, and groups whose holder was lost (DESIGN §2)."""

from collections.abc import Sequence

import asyncrl.replay.log.events as ev
from asyncrl.replay.ledger import StoreContext
from asyncrl.replay.plan import ticket_seed
from asyncrl.replay.state import Group
from asyncrl.types import Purpose, Ticket, Version

TOO_OLD = "weights too old"


class Holders:
    """Who works on which group, and who was lost. Volatile: after a restart of the store every holder starts afresh.

    A group in flight is *lost* when its holder was silent for `lease_s`, came back as a newer incarnation, or no longer
    names it. A slow holder that names it again before it was reissued gets it back.
    """

    def __init__(self, book: StoreContext) -> None:
        self._book = book
        self._deadlines: dict[str, float] = {}
        self._lost: set[int] = set()
        self._since: dict[int, float] = {}  # when a group in flight was first seen, for the watchdog
        now = book.clock()
        for group in self._groups():
            self._deadlines[group.worker] = now + book.plan.lease_s

    def _groups(self) -> list[Group]:
        """Groups with rollouts still to come, for training and evaluation."""
        ledger = self._book.ledger
        evals = list(ledger.round.groups.values()) if ledger.round else []
        return [g for g in [*ledger.groups.values(), *evals] if g.in_flight()]

    def renew(self, worker: str) -> None:
        if worker in self._deadlines:
            self._deadlines[worker] = self._book.clock() + self._book.plan.lease_s

    def arrive(self, worker: str, incarnation: int, held: Sequence[int]) -> bool:
        """A holder reports what it still works on; whether something is lost now that was not before."""
        now = self._book.clock()
        self._deadlines[worker] = now + self._book.plan.lease_s
        named, before, groups = set(held), len(self._lost), self._groups()
        self._since = {g.id: self._since.get(g.id, now) for g in groups}
        for group in groups:
            if group.worker == worker:
                mine = group.incarnation == incarnation and group.id in named
                (self._lost.discard if mine else self._lost.add)(group.id)
        return len(self._lost) > before

    def forget(self, worker: str, incarnation: int) -> bool:
        """Gives up what a worker held up to this incarnation; whether there was any."""
        before = len(self._lost)
        self._lost.update(g.id for g in self._groups() if g.worker == worker and g.incarnation <= incarnation)
        return len(self._lost) > before

    def expire(self) -> bool:
        """Gives up silent holders; whether any was."""
        now = self._book.clock()
        silent = {worker for worker, deadline in self._deadlines.items() if deadline <= now}
        for worker in silent:
            del self._deadlines[worker]
        if silent:
            self._lost.update(g.id for g in self._groups() if g.worker in silent)
        return bool(silent)

    def next_deadline(self) -> float | None:
        return min(self._deadlines.values(), default=None)

    def age_s(self, group: int) -> float:
        """For how long a group has been in flight, as far as its holder has reported since."""
        now = self._book.clock()
        return now - self._since.get(group, now)

    def is_lost(self, group: int) -> bool:
        return group in self._lost

    def lost(self) -> list[Group]:
        """Lost groups that are still wanted, oldest first."""
        found = [(g, self._book.ledger.find(g)) for g in sorted(self._lost)]
        wanted = [group for _, group in found if group is not None and group.in_flight()]
        self._lost = {group.id for group in wanted}
        return wanted

    def holds(self, worker: str, incarnation: int, group: int) -> bool:
        """Whether this caller still is the holder of a wanted group."""
        found = self._book.ledger.find(group)
        return found is not None and (found.worker, found.incarnation) == (worker, incarnation) and group not in self._lost

    def reissue(self, group: Group, worker: str, incarnation: int, version: Version) -> Ticket:
        self._book.record(ev.GroupReissued(group.id, group.attempt + 1, version.update, worker, incarnation))
        self._lost.discard(group.id)
        return ticket(self._book, group)


class Admission:
    """Hands out training tickets within the bound."""

    def __init__(self, book: StoreContext, holders: Holders) -> None:
        self._book = book
        self._holders = holders

    def tickets(self, k: int, worker: str, incarnation: int, version: Version, held: Sequence[int]) -> list[Ticket]:
        """Up to k tickets: lost groups first, then retries, then new prompts."""
        tickets = self._reissues(k, worker, incarnation, version, held)
        for _ in range(min(k - len(tickets), self._room(version))):
            if self._book.exhausted():
                break
            tickets.append(self._reserve(worker, incarnation, version))
        return tickets

    def waiting_for(self, version: Version) -> str:
        """Why a caller at `version` gets no ticket now."""
        if self._book.exhausted():
            return "data"
        newest = Version(self._book.ledger.incarnation, max(self._update(version), self._book.ledger.committed))
        if self._room(version) <= 0 < self._room(newest):
            return TOO_OLD
        return "bound full"

    def _update(self, version: Version) -> int:
        """The update that admission counts with. Weights of a lost lineage may be ahead of the restored one, but their
        holder is about to fall back to it."""
        ledger = self._book.ledger
        return version.update if version.incarnation == ledger.incarnation else min(version.update, ledger.committed)

    def _room(self, version: Version) -> int:
        ledger, plan = self._book.ledger, self._book.plan
        outstanding = len(ledger.groups)
        room = plan.rule.room(outstanding=outstanding, committed=ledger.committed, update=self._update(version))
        return room if plan.capacity_groups is None else min(room, plan.capacity_groups - outstanding)

    def _reissues(self, k: int, worker: str, incarnation: int, version: Version, held: Sequence[int]) -> list[Ticket]:
        ledger, rule = self._book.ledger, self._book.plan.rule
        tickets: list[Ticket] = []
        for group in self._holders.lost():
            # A caller that still works on the lost attempt must first hear that it is cancelled.
            if len(tickets) >= k or group.purpose == "eval" or group.id in held:
                continue
            position = ledger.position(group.id)
            if rule.reissuable(position=position, committed=ledger.committed, update=self._update(version)):
                tickets.append(self._holders.reissue(group, worker, incarnation, version))
        return tickets

    def _reserve(self, worker: str, incarnation: int, version: Version) -> Ticket:
        ledger, grouping = self._book.ledger, self._book.plan.grouping
        position, retry = ledger.retries[0] if ledger.retries else (ledger.cursor, 0)
        group = ledger.next_group
        update = self._update(version)
        self._book.record(
            ev.GroupReserved(group, "train", position, retry, grouping.n, update, worker, incarnation, grouping.baseline)
        )
        return ticket(self._book, ledger.groups[group])


def ticket(book: StoreContext, group: Group) -> Ticket:
    """The ticket for what a group still misses."""
    purpose: Purpose = group.purpose
    source = book.plan.source
    if purpose == "eval":
        assert book.plan.evaluation is not None
        assert book.ledger.round is not None
        prompt, sampling = book.plan.evaluation.prompts[group.position], book.plan.evaluation.sampling
        pinned = book.ledger.round.version
    else:
        prompt, sampling, pinned = source.prompts[book.order.index(group.position)], source.sampling, None
    missing = group.missing()
    return Ticket(
        group=group.id,
        attempt=group.attempt,
        prompt=prompt,
        rollouts=missing,
        seeds=tuple(ticket_seed(source.seed, purpose, group.position, group.retry, r) for r in missing),
        sampling=sampling,
        purpose=purpose,
        pinned=pinned,
        baseline=None if group.baseline() is None else group.n,
    )
