"""Rollouts come in, wait for a verdict, and their groups become ready, filtered or failed."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count, takewhile

from msgspec import Struct
from msgspec.structs import replace

import asyncrl.replay.log.events as ev
import asyncrl.replay.log.rows as schema
from asyncrl.replay.admission import Holders
from asyncrl.replay.context import Poll, StoreContext
from asyncrl.replay.evaluations import Evaluations
from asyncrl.replay.failures import FailureWatch
from asyncrl.replay.state import Group
from asyncrl.types import Key, Score


class RewardLease(Struct):
    """Rollouts (group, rollout) that a reward worker scores until `deadline`. Others may have scored some of them meanwhile."""

    caller: Key
    deadline: float  # on the clock of the store's context
    items: set[tuple[int, int]]


class Scoring:
    """Volatile: the queue of unscored rollouts and their leases; both are rebuilt from the ledger."""

    def __init__(self, context: StoreContext, holders: Holders, evaluations: Evaluations, watch: FailureWatch) -> None:
        self._context = context
        self._watch = watch
        self._ledger = context.ledger
        self._holders = holders
        self._evaluations = evaluations
        self._queue = OrderedDict.fromkeys(
            item for g in self._ledger.outstanding() for i in range(len(g.rollouts)) for item in self._to_score(g.id, i)
        )
        self.leases: dict[int, RewardLease] = {}  # in the order in which they run out
        self._next_lease = 1

    # ---------------------------------------------------------------------------------------- submit

    def submit(self, caller: Key, rows: bytes) -> None:
        """Returns when the operating system has them; rows that came too late are ignored."""
        batch = schema.read_submitted(rows)
        summaries = schema.summaries(batch)
        self._holders.renew(caller.worker)
        accepted = self.acceptable(summaries)
        if accepted:
            first = self._context.log.append_rows(batch if len(accepted) == batch.num_rows else batch.take(accepted))
            self.submitted([summaries[i] for i in accepted], first)

    def acceptable(self, summaries: Sequence[schema.Summary]) -> list[int]:
        """Indices of the rows that count: the first of (group, rollout), of the present attempt, of a wanted group.

        A row that would break the bound is not taken: when its holder is through with the group and no longer names it,
        the rollout is still missing, and is reissued to someone with newer weights.
        """
        seen: set[tuple[int, int]] = set()
        older: dict[int, int] = {}  # groups whose oldest token is older than was known
        accepted = []
        for i, s in enumerate(summaries):
            group = self._ledger.find(s.group)
            if group is None or not group.in_flight() or s.attempt != group.attempt or (s.group, s.rollout) in seen:
                continue
            if not 0 <= s.rollout < len(group.rollouts) or group.rollouts[s.rollout].row >= 0:
                continue
            if not s.problem and self._breaks_bound(group, s, older):
                continue
            seen.add((s.group, s.rollout))
            accepted.append(i)
        return accepted

    def _breaks_bound(self, group: Group, s: schema.Summary, older: dict[int, int]) -> bool:
        """Only of a group that was lost; after a restore, where the weights in use fell back to the checkpoint while the
        rollout ran; or of an evaluation, with weights that its round does not take."""
        ledger = self._ledger
        if group.purpose == "eval":
            assert ledger.round is not None
            return not self._evaluations.takes(s, ledger.round)
        if not self._context.plan.rule.holds or s.rollout >= group.n:  # a baseline has nothing to train
            return False
        if not self._holders.regain(group):
            return True
        if s.oldest < older.get(group.id, group.oldest()):
            if not self._holders.fits(group, s.oldest, older):
                return True
            older[group.id] = s.oldest
        return False

    def submitted(self, summaries: Sequence[schema.Summary], first_row: int) -> None:
        """Counts accepted rows, which the log holds from number `first_row` on."""
        for row, s in enumerate(summaries, first_row):
            event = ev.RolloutSubmitted(s.group, s.rollout, s.attempt, row, s.oldest, s.newest, s.length, s.figures)
            self._context.record(event)
            if s.problem and s.figures is not None:  # an environment that never works ends the run, as a reward does
                verdict = Score(group=s.group, rollout=s.rollout, attempt=s.attempt, status=s.status, error=s.problem)
                self._watch.note(self._ledger.get(s.group), verdict)
            if s.problem:
                self._verdict(ev.RolloutScored(s.group, s.rollout, s.attempt, s.status, None, {}, s.problem))
            self._queue.update(dict.fromkeys(self._to_score(s.group, s.rollout)))
        self._context.stir("unscored")
        self._evaluations.finish_if_complete()

    # ----------------------------------------------------------------------------------------- score

    def lease_unscored(self, caller: Key, k: int, wait_s: float) -> Poll:
        """Waits for the first rollout without a score. What an earlier incarnation of the worker held comes first."""
        self.take_back(caller.worker, caller.incarnation - 1)
        lease_s = self._context.plan.lease_s

        def attempt() -> tuple[bool, schema.RowLease]:
            lease, items = self.lease(k, caller)
            if not items:
                ended = self._context.ended()
                return ended, schema.RowLease(0, lease_s, ended=ended)
            rows = self._context.log.take([self._row(*item) for item in items], schema.UNSCORED_COLUMNS)
            return True, schema.RowLease(lease, lease_s, schema.to_ipc(rows))

        return Poll(attempt, wait_s, "unscored")

    def take_back(self, worker: str, incarnation: int) -> None:
        """Queues again what a worker leased up to this incarnation, and died with."""
        theirs = (i for i, x in self.leases.items() if x.caller.worker == worker and x.caller.incarnation <= incarnation)
        self._requeue(sorted(theirs))

    def lease(self, k: int, caller: Key) -> tuple[int, list[tuple[int, int]]]:
        """(lease, up to k (group, rollout)), oldest first; (0, []) if there is nothing to score."""
        items: list[tuple[int, int]] = []
        while self._queue and (len(items) < k or self._belongs(items)):
            item, _ = self._queue.popitem(last=False)
            if self._unscored(*item) is not None:
                items.append(item)
        if not items:
            return 0, []
        lease, self._next_lease = self._next_lease, self._next_lease + 1
        self.leases[lease] = RewardLease(caller, self._context.lease_end(), set(items))
        return lease, items

    def _to_score(self, group: int, rollout: int) -> list[tuple[int, int]]:
        """What can be scored now that a rollout is there: itself, or its whole group if that is complete."""
        together: Sequence[int] = (rollout,)
        if self._context.plan.whole_groups and (found := self._ledger.find(group)) is not None:
            together = range(len(found.rollouts)) if all(r.row >= 0 for r in found.rollouts) else ()
        return [(group, i) for i in together if self._unscored(group, i) is not None]

    def _belongs(self, items: Sequence[tuple[int, int]]) -> bool:
        """Whether the first in the queue has to be leased with the last of these."""
        return self._context.plan.whole_groups and bool(items) and next(iter(self._queue))[0] == items[-1][0]

    def extend(self, caller: Key, lease: int) -> None:
        """Renews a lease. One that expired, or was given before the store restarted, is ignored: its rollouts are queued."""
        found = self.leases.get(lease)
        if found is not None and found.caller.worker == caller.worker:
            found.deadline = self._context.lease_end()
            self.leases[lease] = self.leases.pop(lease)

    def expire(self) -> None:
        """Queues the rollouts of silent workers again."""
        now = self._context.clock()
        self._requeue(sorted(takewhile(lambda lease: self.leases[lease].deadline <= now, self.leases)))

    def _requeue(self, leases: Sequence[int]) -> None:
        """Ends these leases, and queues their rollouts ahead of newer ones."""
        for lease in reversed(leases):
            for item in sorted(self.leases.pop(lease).items, reverse=True):
                self._queue[item] = None
                self._queue.move_to_end(item, last=False)
            self._context.stir("unscored")

    def next_deadline(self) -> float:
        """When the next lease runs out; infinite if there is none."""
        return next((lease.deadline for lease in self.leases.values()), math.inf)

    def accepted(self, scores: Sequence[Score]) -> list[Score]:
        """The verdicts that count, checked: the first on a rollout, whoever holds its lease now; no unknown or late ones."""
        found: dict[tuple[int, int], Score] = {}
        for s in scores:
            group = self._unscored(s.group, s.rollout)
            if group is not None and group.rollouts[s.rollout].attempt == s.attempt and (s.group, s.rollout) not in found:
                found[s.group, s.rollout] = checked(s, group.rollouts[s.rollout].length)
        return list(found.values())

    def score(self, caller: Key, lease: int, scores: Sequence[Score]) -> None:
        """A rollout whose tokens earned something is written once more, with it: that row counts from then on."""
        first, verdicts = 0, self.accepted(scores)
        earning = [(self._row(s.group, s.rollout), s.token_rewards) for s in verdicts if s.token_rewards]
        if earning:
            rows = self._context.log.take([row for row, _ in earning], schema.ROWS.names)
            first = self._context.log.append_rows(schema.with_token_rewards(rows, [earned for _, earned in earning]))
        self.scored(verdicts, first)
        if (held := self.leases.get(lease)) is not None:
            held.items.difference_update((s.group, s.rollout) for s in scores)
            if not held.items:
                del self.leases[lease]

    def scored(self, verdicts: Sequence[Score], first_row: int) -> None:
        """Records verdicts that count. first_row: in the log, of the rollouts among them whose tokens earned something."""
        rows = count(first_row)
        for s in verdicts:
            self._watch.note(self._ledger.get(s.group), s)
            row, total = (next(rows), math.fsum(s.token_rewards)) if s.token_rewards else (None, 0.0)
            said = s.status, s.reward, s.parts, s.error, row, total, s.said, s.scoring
            self._verdict(ev.RolloutScored(s.group, s.rollout, s.attempt, *said))
            self._queue.pop((s.group, s.rollout), None)
        self._evaluations.finish_if_complete()

    @property
    def waiting(self) -> bool:
        """Whether there is something to score."""
        return bool(self._queue)

    def depths(self) -> dict[str, int]:
        return {"unscored": len(self._queue), "scoring": sum(len(lease.items) for lease in self.leases.values())}

    def _row(self, group: int, rollout: int) -> int:
        """Its number in the log."""
        return self._ledger.get(group).rollouts[rollout].row

    def _unscored(self, group: int, rollout: int) -> Group | None:
        """The group, if this rollout of it is submitted, still wanted and without a verdict."""
        found = self._ledger.find(group)
        if found is None or not 0 <= rollout < len(found.rollouts):
            return None
        r = found.rollouts[rollout]
        return found if r.row >= 0 and r.status is None else None

    def _verdict(self, event: ev.RolloutScored) -> None:
        """Records it, and decides on the group if it was the last one missing."""
        group = self._ledger.get(event.group)
        self._context.record(event)
        if group.purpose == "eval" or not group.scored():
            return
        plan, rewards, baseline = self._context.plan, [r.earned for r in group.ok()], group.baseline()
        if len(rewards) < plan.sampling.min_valid or (baseline is not None and baseline.status != "ok"):
            self._context.record(ev.GroupSettled(group.id, "failed", self._context.may_retry(group.retry)))
        elif not plan.keep(rewards):
            self._context.record(ev.GroupSettled(group.id, "filtered", False))


def checked(s: Score, length: int) -> Score:
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
