"""Rollouts come in, wait for a verdict, and their groups become ready, filtered or failed."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from msgspec import Struct
from msgspec.structs import replace

import asyncrl.replay.log.events as ev
from asyncrl.replay.ledger import StoreContext
from asyncrl.replay.state import Group
from asyncrl.types import Score, Version


class Summary(Struct, frozen=True):
    """What the core needs of a submitted row. oldest, newest: updates of tokens that the policy chose.

    version: of all its tokens, None if they differ. problem: why it can't be used, else empty.
    """

    group: int
    rollout: int
    attempt: int
    oldest: int
    newest: int
    length: int
    version: Version | None
    problem: str


class RewardLease(Struct):
    worker: str
    incarnation: int
    deadline: float
    items: set[tuple[int, int]]


class Scoring:
    """Volatile: the queue of unscored rollouts and their leases; both are rebuilt from the ledger."""

    def __init__(self, book: StoreContext) -> None:
        self._book = book
        self._queue: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._leases: dict[int, RewardLease] = {}
        self._next_lease = 1
        ledger = book.ledger
        for group in [*ledger.groups.values(), *(ledger.round.groups.values() if ledger.round else ())]:
            waiting = [i for i, r in enumerate(group.rollouts) if r.row >= 0 and r.status is None]
            self._queue.update(((group.id, i), None) for i in waiting)

    # ---------------------------------------------------------------------------------------- submit

    def acceptable(self, summaries: Sequence[Summary]) -> list[int]:
        """Indices of the rows that count: the first of (group, rollout), of the present attempt, of a wanted group.

        A row that would break the bound is not taken: when its holder is through with the group and no longer names it,
        the rollout is still missing, and is reissued to someone with newer weights.
        """
        seen: set[tuple[int, int]] = set()
        accepted = []
        for i, s in enumerate(summaries):
            group = self._book.ledger.find(s.group)
            if group is None or s.attempt != group.attempt or (s.group, s.rollout) in seen:
                continue
            if not 0 <= s.rollout < len(group.rollouts) or group.rollouts[s.rollout].row >= 0:
                continue
            if not s.problem and self._breaks_bound(group, s):
                continue
            seen.add((s.group, s.rollout))
            accepted.append(i)
        return accepted

    def _breaks_bound(self, group: Group, s: Summary) -> bool:
        """Only after a restore: weights in use fell back to the checkpoint while the rollout ran; or a pin was broken."""
        ledger, rule = self._book.ledger, self._book.plan.rule
        if group.purpose == "eval":
            return ledger.round is not None and s.version != ledger.round.version
        if not rule.waits or s.rollout >= group.n:  # a baseline has nothing to train
            return False
        return not rule.reissuable(position=ledger.position(group.id), committed=ledger.committed, update=s.oldest)

    def submitted(self, summaries: Sequence[Summary], first_row: int) -> None:
        """Counts accepted rows, which the log holds from number `first_row` on."""
        for row, s in enumerate(summaries, first_row):
            event = ev.RolloutSubmitted(s.group, s.rollout, s.attempt, row, s.oldest, s.newest, s.length)
            self._book.record(event)
            if s.problem:
                self._verdict(ev.RolloutScored(s.group, s.rollout, s.attempt, "invalid", None, {}, s.problem))
            else:
                self._queue[(s.group, s.rollout)] = None

    # ----------------------------------------------------------------------------------------- score

    def forget(self, worker: str, incarnation: int) -> bool:
        """Queues again what a worker leased up to this incarnation, and died with; whether there was any."""
        return self._take_back([i for i, x in self._leases.items() if x.worker == worker and x.incarnation <= incarnation])

    def lease(self, k: int, worker: str, incarnation: int) -> tuple[int, list[tuple[int, int]]]:
        """(lease, up to k (group, rollout)), oldest first; (0, []) if there is nothing to score."""
        items: list[tuple[int, int]] = []
        while self._queue and len(items) < k:
            item, _ = self._queue.popitem(last=False)
            if self._unscored(*item) is not None:
                items.append(item)
        if not items:
            return 0, []
        lease, self._next_lease = self._next_lease, self._next_lease + 1
        self._leases[lease] = RewardLease(worker, incarnation, self._book.clock() + self._book.plan.lease_s, set(items))
        return lease, items

    def extend(self, lease: int, worker: str) -> None:
        """Renews a lease. One that expired, or was given before the store restarted, is ignored: its rollouts are queued."""
        found = self._leases.get(lease)
        if found is not None and found.worker == worker:
            found.deadline = self._book.clock() + self._book.plan.lease_s

    def expire(self) -> bool:
        """Queues the rollouts of silent workers again; whether there were any."""
        return self._take_back([i for i, held in self._leases.items() if held.deadline <= self._book.clock()])

    def _take_back(self, leases: Sequence[int]) -> bool:
        """Queues the rollouts of these leases again, ahead of newer ones; whether there were any."""
        for lease in reversed(leases):
            for item in sorted(self._leases.pop(lease).items, reverse=True):
                self._queue[item] = None
                self._queue.move_to_end(item, last=False)
        return bool(leases)

    def next_deadline(self) -> float | None:
        return min((lease.deadline for lease in self._leases.values()), default=None)

    def counting(self, scores: Sequence[Score]) -> list[Score]:
        """The verdicts that count, checked: the first on a rollout, whoever holds its lease now; no unknown or late ones."""
        found: dict[tuple[int, int], Score] = {}
        for s in scores:
            group = self._unscored(s.group, s.rollout)
            if group is not None and group.rollouts[s.rollout].attempt == s.attempt and (s.group, s.rollout) not in found:
                found[s.group, s.rollout] = _checked(s, group.rollouts[s.rollout].length)
        return list(found.values())

    def score(self, lease: int, scores: Sequence[Score], first_row: int = 0) -> None:
        """Records the verdicts that count. first_row: in the log, of the rollouts among them whose tokens earned something."""
        rows = count(first_row)
        for s in self.counting(scores):
            event = ev.RolloutScored(s.group, s.rollout, s.attempt, s.status, s.reward, s.parts, s.error)
            if s.token_rewards:
                event = replace(event, row=next(rows), token_sum=math.fsum(s.token_rewards))
            self._verdict(event)
            self._queue.pop((s.group, s.rollout), None)
        done = {(s.group, s.rollout) for s in scores}
        for number in [i for i, held in self._leases.items() if i == lease or held.items & done]:
            self._leases[number].items -= done
            if not self._leases[number].items:
                del self._leases[number]

    def depths(self) -> dict[str, int]:
        return {"unscored": len(self._queue), "scoring": sum(len(lease.items) for lease in self._leases.values())}

    def leases(self) -> dict[int, RewardLease]:
        return self._leases

    def _unscored(self, group: int, rollout: int) -> Group | None:
        """The group, if this rollout of it is submitted, still wanted and without a verdict."""
        found = self._book.ledger.find(group)
        if found is None or not 0 <= rollout < len(found.rollouts):
            return None
        r = found.rollouts[rollout]
        return found if r.row >= 0 and r.status is None else None

    def _verdict(self, event: ev.RolloutScored) -> None:
        """Records it, and decides on the group if it was the last one missing."""
        group = self._book.ledger.find(event.group)
        assert group is not None
        self._book.record(event)
        if group.purpose == "eval" or not group.scored():
            return
        grouping, rewards, baseline = self._book.plan.grouping, [r.earned for r in group.ok()], group.baseline()
        if len(rewards) < grouping.min_valid or (baseline is not None and baseline.status != "ok"):
            self._book.record(ev.GroupSettled(group.id, "failed", self._book.may_retry(group.retry)))
        elif not grouping.keep(rewards):
            self._book.record(ev.GroupSettled(group.id, "filtered", False))


def _checked(s: Score, length: int) -> Score:
    """Only `ok` with finite rewards counts as ok: a missing or non-finite one is never a silent 0. length: of the response."""
    error = ""
    if s.status == "ok" and (s.reward is None or not math.isfinite(s.reward)):
        error = f"reward={s.reward} is not a number"
    elif s.status == "ok" and s.token_rewards is not None and len(s.token_rewards) != length:
        error = f"{len(s.token_rewards)} token_rewards for {length} response tokens: one per token is expected"
    elif s.status == "ok" and not math.isfinite(sum(s.token_rewards or ())):
        error = "token_rewards or their sum are not finite"
    if s.status == "ok" and not error:
        return s
    return replace(s, status="invalid" if error else s.status, reward=None, token_rewards=None, error=error or s.error)
