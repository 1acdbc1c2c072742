"""Reservations of training groups: admission, retries, groups whose holder was lost, and prompts that holders die of."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile

from msgspec.structs import replace

import asyncrl.replay.log.events as ev
from asyncrl.errors import DataError
from asyncrl.replay.context import StoreContext
from asyncrl.replay.outstanding import Outstanding
from asyncrl.replay.plan import ticket_seed
from asyncrl.replay.state import Group, PromptKey
from asyncrl.report.timing import TimeInState
from asyncrl.types import TOO_OLD, Key, Prompt, Ticket, Tokens, Version

log = logging.getLogger(__name__)
_SUSPECT = 2  # deaths: after one everything goes on as before, since most are coincidence


class Holders:
    """Who works on which group, and who was lost. Leases are volatile: after a restart of the store every holder starts afresh.

    A group in flight is *lost* when its holder died, was silent for `lease_s`, came back as a newer incarnation, or no longer
    names it. Nobody waits for it then: but for the rollouts that it has, it counts in no deadline. A slow holder that names it
    again before it was reissued gets it back, if the bound still holds with it.

    A prompt that its holders die of must not end one after the other. Only *deaths* count, which the supervisor tells
    (`forget`); a lost reply, silence, a hand-over or a resumed run are nobody's fault. A death counts for every prompt that was
    in flight there, those included that others got while the holder was silent; once all rollouts of a prompt are here, its
    count is void. Neighbours die together, so the count alone convicts nobody:

    - Of the prompts in flight at a death, the one with the most deaths is given up if these are `sampling.max_attempts`
      or more, and no other one has as many. Its group ends `failed`, and the supervisor names it.
    - So that the next death decides between them, a holder gets one prompt with two deaths or more at a time.
    - The deaths of one that is given up are explained: they count no longer for the others.

    Thus a deadly prompt costs max_attempts deaths, or three where neighbours hide it from a smaller cap, and a harmless one is
    lost only if as many holders die of something else around it, the last of them while it alone is suspected there.
    """

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._ledger = context.ledger
        self._rule = context.plan.rule
        holders = (g.worker for g in self._ledger.in_flight() if g.worker)
        self._lease_ends = dict.fromkeys(holders, context.lease_end())  # in the order in which they end
        self._lost = dict.fromkeys(sorted(g.id for g in self._ledger.in_flight() if not g.worker))
        self._outstanding = Outstanding(context, self.deadline, lambda group: self._lost.pop(group, None))
        self._taken: defaultdict[tuple[str, int], set[int]] = defaultdict(set)  # groups reissued while this holder was silent
        # Groups that were lost before counted in no deadline, so that counting them again may break the bound.
        self._lose([group.id for group in self.misfits() if group.in_flight()])

    def renew(self, worker: str) -> None:
        if self._lease_ends.pop(worker, None) is not None:
            self._lease_ends[worker] = self._context.lease_end()

    def arrive(self, caller: Key, held: Sequence[int]) -> None:
        """A holder reports what it still works on: once per call, however long that waits."""
        self._lease_ends.pop(caller.worker, None)
        self._lease_ends[caller.worker] = self._context.lease_end()
        self._taken.pop((caller.worker, caller.incarnation), None)  # it was slow, and lives
        named, theirs = set(held), self._outstanding.held_by(caller.worker)
        kept = {g.id for g in theirs if g.incarnation == caller.incarnation and g.id in named}
        for group in theirs:
            if group.id in kept:
                self.regain(group)
        self._lose([g.id for g in theirs if g.id not in kept])

    def forget(self, worker: str, incarnation: int, excused: bool = False) -> None:
        """A worker died: what it held up to this incarnation is lost. Gives a prompt up if it is to blame; never, where the
        worker is excused: it was given up, or its node was."""
        silent = [holder for holder in self._taken if holder[0] == worker and holder[1] <= incarnation]
        taken = {group for holder in silent for group in self._taken.pop(holder)}
        held = {g.id: g for g in self._outstanding.held_by(worker) if g.incarnation <= incarnation}
        others = [g for g in map(self._ledger.find, taken - held.keys()) if g is not None and g.in_flight()]
        if excused:
            self._lose(held)
        elif dead := sorted([*held.values(), *others], key=lambda g: (g.purpose == "eval", g.id)):
            self._context.record(ev.HolderDied(worker, incarnation, tuple(g.id for g in dead)))
            self._lose(held)
            self._convict(dead, worker)

    def _convict(self, groups: Sequence[Group], worker: str) -> None:
        """Gives up the one prompt with the most deaths of those in flight with a worker that died, if they are too many."""
        deaths, limit = self._ledger.deaths_of, self._context.plan.sampling.max_attempts
        most = max(deaths(group.prompt) for group in groups)
        suspects = [group for group in groups if deaths(group.prompt) == most]
        if most < limit or len(suspects) > 1:
            return
        (group,) = suspects
        kind, row = "held-out prompt" if group.purpose == "eval" else "prompt", prompt_of(self._context, group).row
        message = (
            f"the {kind} in row {row} of the data (position {group.position}, group {group.id}) was in flight when {most} "
            f"generators died, the last of them {worker}, and no other prompt as often: it is not tried again "
            f"(sampling.max_attempts={limit}); logs/ says why they died; take the row out of the data if it is to blame"
        )
        self._context.record(ev.GroupSettled(group.id, "failed", False, message))

    def may_take(self, prompt: PromptKey, caller: Key) -> bool:
        """False for a suspected prompt while the caller holds another one."""
        deaths = self._ledger.deaths_of
        if deaths(prompt) < _SUSPECT:
            return True
        theirs = self._outstanding.held_by(caller.worker)
        return not any(deaths(g.prompt) >= _SUSPECT and self.holds(caller, g.id) for g in theirs)

    def expire(self) -> None:
        """Takes what silent workers held as lost."""
        now = self._context.clock()
        silent = list(takewhile(lambda worker: self._lease_ends[worker] <= now, self._lease_ends))
        for worker in silent:
            del self._lease_ends[worker]
        self._lose([group.id for worker in silent for group in self._outstanding.held_by(worker)])

    def regain(self, group: Group) -> bool:
        """Whether a group is not lost, or is no longer, because its holder is heard of and the bound still holds with it."""
        free = group.purpose == "eval" or not self._rule.holds
        if group.id in self._lost and group.worker and (free or self.fits(group, group.oldest())):
            del self._lost[group.id]
            self._context.touched.add(group.id)
        return group.id not in self._lost

    def _lose(self, groups: Iterable[int]) -> None:
        if new := [group for group in groups if group not in self._lost]:
            self._lost = dict.fromkeys(sorted([*self._lost, *new]))
            self._context.touched.update(new)
            self._context.stir("tickets", "batch", *new)

    def next_deadline(self) -> float:
        """When the next worker counts as silent; infinite if there is none."""
        return next(iter(self._lease_ends.values()), math.inf)

    def age_s(self, group: int) -> float:
        """For how long a group has been in flight, as far as its holder has reported since."""
        since = self._outstanding.since(group)
        return 0.0 if since is None else self._context.clock() - since

    def is_lost(self, group: int) -> bool:
        return group in self._lost

    def lost(self) -> Iterator[Group]:
        """Lost groups that are still wanted, oldest first. They may be reissued meanwhile."""
        self._outstanding.look()  # which drops the others
        return map(self._ledger.get, list(self._lost))

    def deadline(self, group: Group) -> float:
        """How many updates may be committed before a group is in a batch; inf where nobody waits for it."""
        oldest = group.oldest_submitted() if group.id in self._lost else group.oldest()
        return math.inf if oldest is None or group.excused or group.hopeless() else self._rule.deadline(oldest)

    def fits(self, group: Group, oldest: int, others: Mapping[int, int] = {}) -> bool:
        """Whether tokens from update `oldest` may become a part of a group that is in no batch: they can be trained in time;
        and, where the rule holds, so can every group. others: updates of tokens that are about to become a part of those."""
        rule, committed = self._rule, self._ledger.planned
        if group.excused or not rule.holds:
            return rule.deadline(oldest) >= committed
        due = self._outstanding.due()
        for coming, update in {**others, group.id: oldest}.items():
            deadline = self._outstanding.deadline(coming)
            due[deadline] -= 1
            due[min(deadline, rule.deadline(update))] += 1
        return rule.feasible(due, committed)

    def in_time(self, committed: int, without: Sequence[int]) -> bool:
        """Whether all groups that are in no batch can be trained in time after `committed` updates, but for these."""
        due = self._outstanding.due()
        due.subtract(map(self._outstanding.deadline, without))
        return self._rule.feasible(due, committed)

    def in_time_at_best(self, committed: int, batch: int) -> bool:
        """The same without any `batch` ready groups; looks at no group."""
        return self._rule.feasible(self._outstanding.due_but(batch), committed)

    def misfits(self) -> list[Group]:
        """The fewest groups without which all others can be trained in time: none, but where a run is resumed with a smaller
        max_lag, or groups were lost before the store restarted."""
        untaken, rule = self._ledger.untaken(), self._rule
        if not rule.holds or rule.feasible(map(self.deadline, untaken), self._ledger.planned):
            return []
        # Those first that have the most to lose; what has no rollout yet can be generated again from newer weights.
        keep_first = sorted(untaken, key=lambda g: (g.in_flight(), g.oldest_submitted() is None, -self.deadline(g)))
        found = rule.misfits(((g.id, self.deadline(g)) for g in keep_first), self._ledger.planned)
        return [self._ledger.groups[group] for group in found]

    def holds(self, caller: Key, group: int) -> bool:
        """Whether this caller still is the holder of a wanted group."""
        found = self._ledger.find(group)
        mine = found is not None and (found.worker, found.incarnation) == (caller.worker, caller.incarnation)
        return mine and group not in self._lost

    def reissue(self, group: Group, caller: Key, update: int, floor: int = 0) -> Ticket:
        """Of a lost group. update: of the caller's weights, as far as they count. floor: the update of the oldest token with
        which a rollout may go on; one that has older ones begins anew."""
        if group.worker and group.worker not in self._lease_ends:
            self._taken[group.worker, group.incarnation].add(group.id)
        begun, missing = self._begun(group, floor), [(i, group.rollouts[i]) for i in group.missing()]
        dropped = tuple(i for i, r in missing if r.pieces and i not in begun)
        most, interval = self._context.plan.source.sampling.max_tokens, self._context.plan.stream_interval
        lost = sum(min(most, interval or most, most - r.length) + r.length * (i in dropped) for i, r in missing)
        lost *= group.purpose == "train"
        self._context.record(
            ev.GroupReissued(group.id, group.attempt + 1, update, caller.worker, caller.incarnation, dropped, lost)
        )
        del self._lost[group.id]
        return replace(ticket(self._context, group), begun=begun)

    def _begun(self, group: Group, floor: int) -> dict[int, Tokens]:
        """What was streamed of its missing rollouts, where that is of use. What can't be read is none, and said in the log."""
        found: dict[int, Tokens] = {}
        for i, r in enumerate(group.rollouts):
            fresh = i >= group.n or r.oldest >= floor  # of a baseline nothing is trained
            if r.row < 0 and r.pieces and fresh and r.length < self._context.plan.source.sampling.max_tokens:
                try:
                    found[i] = self._context.log.take_pieces(r.pieces)
                except DataError as error:
                    log.warning("rollout %d of group %d begins anew: %s", i, group.id, error)
        return found


class Admission:
    """Hands out training tickets within the bound."""

    def __init__(self, context: StoreContext, holders: Holders, pauses: Callable[[], bool]) -> None:
        """pauses: whether no new group is wanted for now."""
        self._context = context
        self._ledger = context.ledger
        self._rule = context.plan.rule
        self._holders = holders
        self._pauses = pauses
        self.most_outstanding = self._rule.most_outstanding  # groups; it follows the number of engines
        self._newest = Version(0, 0)  # weights that anybody asked with
        self.time = TimeInState("free", context.clock)  # what keeps callers with free slots from more work, if anything does

    def tickets(self, k: int, caller: Key, version: Version, held: Sequence[int]) -> list[Ticket]:
        """Up to k tickets: lost groups first, then retries, then new prompts."""
        self._newest = max(self._newest, version)
        tickets = self._reissues(k, caller, version, held)
        for _ in range(min(k - len(tickets), self._room(version))):
            retries = self._ledger.retries
            if (
                self._context.exhausted()
                or self._pauses()
                or (retries and not self._holders.may_take(("train", retries[0][0]), caller))
            ):
                break
            tickets.append(self._reserve(caller, version))
        self.time.enter(self._limit(version) if len(tickets) < k else "free")
        return tickets

    def waiting_for(self, version: Version) -> str:
        """Why a caller at `version` gets no ticket now."""
        if self._context.exhausted():
            return "data"
        if self._pauses():
            return "first reward"
        newest = Version(self._ledger.incarnation, max(self._update(version), self._ledger.committed))
        if self._room(version) <= 0 < self._room(newest):
            return TOO_OLD
        return "bound full"

    def offers(self) -> bool:
        """Whether anybody can get a ticket, or is to hear that its weights are too old."""
        if next(self._holders.lost(), None) is not None:
            return True
        room = not self._context.exhausted() and not self._pauses()
        return room and self._room(max(self._newest, Version(self._ledger.incarnation, self._ledger.committed))) > 0

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
        return self.most_outstanding - len(self._ledger.groups)

    def _reissues(self, k: int, caller: Key, version: Version, held: Sequence[int]) -> list[Ticket]:
        update, theirs = self._update(version), set(held)
        tickets: list[Ticket] = []
        misfits: set[tuple[bool, float]] = set()  # what is reissued leaves less room for the next one like these
        for group in self._holders.lost():
            if len(tickets) >= k:
                break
            # A caller that still works on the lost attempt must first hear that it is cancelled.
            if group.purpose == "eval" or group.id in theirs or not self._holders.may_take(group.prompt, caller):
                continue
            if (like := (group.excused, self._holders.deadline(group))) in misfits:
                continue
            begun = {r.oldest_at(update) for r in group.sampled() if r.row < 0}
            for floor in sorted({*begun, update}):  # the more goes on, the older is the group
                if self._holders.fits(group, floor):
                    tickets.append(self._holders.reissue(group, caller, update, floor))
                    break
            else:
                misfits.add(like)
        return tickets

    def _reserve(self, caller: Key, version: Version) -> Ticket:
        ledger, plan = self._ledger, self._context.plan
        position, retry = ledger.retries[0] if ledger.retries else (ledger.cursor, 0)
        group, n, update = ledger.next_group, plan.sampling.n, self._update(version)
        self._context.record(
            ev.GroupReserved(group, "train", position, retry, n, update, caller.worker, caller.incarnation, plan.baseline)
        )
        return ticket(self._context, ledger.groups[group])


def prompt_of(context: StoreContext, group: Group) -> Prompt:
    """What a group's rollouts answer."""
    if group.purpose == "train":
        return context.plan.source.prompts[context.plan.source.index(group.position)]
    return context.plan.evaluation.at(group.position)[1]


def ticket(context: StoreContext, group: Group) -> Ticket:
    """The ticket for what a group still misses."""
    source, sampling, pinned, running = context.plan.source, context.plan.source.sampling, None, context.ledger.round
    if group.purpose == "eval" and running is not None:
        sampling = context.plan.evaluation.at(group.position)[0].sampling
        pinned = running.version if context.plan.evaluation.pinned else None
    missing = group.missing()
    return Ticket(
        group=group.id,
        attempt=group.attempt,
        prompt=prompt_of(context, group),
        rollouts=missing,
        seeds=tuple(ticket_seed(source.seed, group.purpose, group.position, group.retry, r) for r in missing),
        sampling=sampling,
        purpose=group.purpose,
        pinned=pinned,
        baseline=None if group.baseline() is None else group.n,
    )
