"""The durable state of the store: what the log says, nothing else. `apply` is the only way it changes.

Leases of workers, deadlines and waiters are not here: they die with the process, and nothing is lost with them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import asyncrl.replay.log.events as ev
from asyncrl.replay.log.events import AnyEvent
from asyncrl.replay.plan import PromptOrder, StorePlan
from asyncrl.replay.state import Commit, EvalRound, Group, Lease, Lengths, Reopened, RolloutState
from asyncrl.types import Counts, Outcome, Record, Version


@dataclass
class Ledger:
    """groups: outstanding training groups by id (ascending age is ascending id, reopened ones apart). taken: those of them
    that are leased to a learner or reopened. ready: scored, kept and not taken. commits: by update, since the oldest
    retained checkpoint. empty_groups: groups failed or filtered since the last batch or start. max_lag: only for `lengths`."""

    max_lag: int
    groups: dict[int, Group] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    ready: set[int] = field(default_factory=set)
    cursor: int = 0
    retries: deque[tuple[int, int]] = field(default_factory=deque)  # (position, retry)
    leases: dict[int, Lease] = field(default_factory=dict)
    reopened: list[Reopened] = field(default_factory=list)
    commits: dict[int, Commit] = field(default_factory=dict)
    committed: int = 0
    retained: int = 0
    incarnation: int = 0
    next_group: int = 0
    next_lease: int = 1
    reserved: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=lambda: {"trained": 0, "filtered": 0, "evicted": 0, "failed": 0})
    round: EvalRound | None = None
    queued: Version | None = None
    empty_groups: int = 0
    last_error: str = ""  # of the newest rollout without a reward
    records: list[Record] = field(default_factory=list)
    lengths: Lengths = field(default_factory=Lengths)
    workers: dict[str, int] = field(default_factory=dict)  # newest incarnation that held a group
    ended: bool = False

    def find(self, group: int) -> Group | None:
        """A group that is still outstanding, for training or evaluation."""
        if group in self.groups:
            return self.groups[group]
        return self.round.groups.get(group) if self.round else None

    def counts(self) -> Counts:
        return Counts(reserved=self.reserved, pending=len(self.groups), **self.outcomes)

    def position(self, group: int) -> int:
        """How many outstanding groups are trained before this one, oldest first."""
        return len(self.taken) + sum(1 for other in self.groups if other < group and other not in self.taken)

    def apply(self, event: ev.AnyEvent) -> None:
        _APPLY[type(event)](self, event)

    def _reserved(self, e: ev.GroupReserved) -> None:
        size = e.n + e.baseline
        rollouts = [RolloutState() for _ in range(size)]
        group = Group(e.group, e.purpose, e.position, e.retry, 0, e.update, e.worker, e.incarnation, rollouts, e.n, size, size)
        self.next_group = e.group + 1
        self.workers[e.worker] = max(e.incarnation, self.workers.get(e.worker, 0))
        if e.purpose == "eval":
            assert self.round is not None
            self.round.groups[e.group] = group
            self.round.next = e.position + 1
            return
        self.groups[e.group] = group
        self.reserved += 1
        if e.retry:
            self.retries.remove((e.position, e.retry))
        else:
            self.cursor = e.position + 1

    def _reissued(self, e: ev.GroupReissued) -> None:
        group = self._get(e.group)
        group.attempt, group.update, group.worker, group.incarnation = e.attempt, e.update, e.worker, e.incarnation
        self.workers[e.worker] = max(e.incarnation, self.workers.get(e.worker, 0))

    def _submitted(self, e: ev.RolloutSubmitted) -> None:
        group = self._get(e.group)
        r = group.rollouts[e.rollout]
        r.row, r.attempt, r.oldest, r.newest, r.length = e.row, e.attempt, e.oldest, e.newest, e.length
        group.unsubmitted -= 1
        if group.purpose == "train" and e.rollout < group.n:
            self.lengths.dispatched += 1
            self.lengths.dispatched_tokens += e.length

    def _scored(self, e: ev.RolloutScored) -> None:
        group = self._get(e.group)
        r = group.rollouts[e.rollout]
        r.status, r.reward, r.parts = e.status, 0.0 if e.reward is None else e.reward, e.parts
        if e.row is not None:
            r.row, r.token_sum = e.row, e.token_sum
        group.unscored -= 1
        self.last_error = e.error or self.last_error
        if group.purpose == "train" and group.scored():
            self.ready.add(e.group)

    def _settled(self, e: ev.GroupSettled) -> None:
        group = self.groups.pop(e.group)
        self.ready.discard(e.group)
        self.outcomes[e.outcome] += 1
        self.empty_groups += e.outcome != "evicted"
        if e.retry:
            self.retries.append((group.position, group.retry + 1))

    def _leased(self, e: ev.BatchLeased) -> None:
        self.leases[e.lease] = Lease(e.lease, e.update, e.groups, e.replayed)
        self.next_lease = e.lease + 1
        self.empty_groups = 0
        self.taken.update(e.groups)
        self.ready.difference_update(e.groups)
        if e.replayed:
            self.reopened.pop(0)

    def _committed(self, e: ev.BatchCommitted) -> None:
        lease = self.leases.pop(e.lease)
        groups = [self.groups.pop(g) for g in lease.groups]
        self.taken.difference_update(lease.groups)
        self.committed = e.version.update
        self.commits[e.version.update] = Commit(e.lease, e.version, groups)
        self.outcomes["trained"] += len(groups)
        self._count_trained(groups, e.version.update - 1, 1)
        self._note("step", e.version, e.time, e.metrics)

    def _fenced(self, e: ev.LearnerFenced) -> None:
        """Void leases become ready, or reopened again; commits after the checkpoint are reopened before those."""
        self.incarnation = e.incarnation
        self.ended, self.empty_groups = False, 0
        again = list(self.reopened)
        for lease in self.leases.values():
            if lease.replayed:
                again.append(Reopened(lease.update, lease.groups))
            else:
                self.taken.difference_update(lease.groups)
                self.ready.update(lease.groups)
        self.leases.clear()
        for update in [u for u in self.commits if u > e.committed]:
            undone = self.commits.pop(update)
            again.append(Reopened(update - 1, tuple(g.id for g in undone.groups)))
            self.groups.update((g.id, g) for g in undone.groups)
            self.outcomes["trained"] -= len(undone.groups)
            self._count_trained(undone.groups, update - 1, -1)
        self.reopened = sorted(again, key=lambda r: r.update)
        self.taken.update(g for r in self.reopened for g in r.groups)
        self.committed = e.committed

    def _retained(self, e: ev.CheckpointRetained) -> None:
        self.retained = e.oldest
        self.commits = {u: c for u, c in self.commits.items() if u > e.oldest}

    def _eval_requested(self, e: ev.EvalRequested) -> None:
        if self.round is None or self.round.next == 0:
            self.round = EvalRound(e.version, 0, {})
        elif self.round.version != e.version:
            self.queued = e.version

    def _eval_pinned(self, e: ev.EvalPinned) -> None:
        self.round = EvalRound(e.version, 0, {})
        if self.queued is not None and self.queued <= e.version:
            self.queued = None

    def _evaluated(self, e: ev.Evaluated) -> None:
        self.round = None if self.queued is None else EvalRound(self.queued, 0, {})
        self.queued = None
        result = e.result
        metrics = {"eval/score": result.score, "eval/count": result.count, "eval/invalid": result.invalid}
        metrics["eval/timeout"] = result.timeout
        metrics |= {"eval/length": result.mean_length} | {f"eval/score/{name}": s for name, s in result.by_source.items()}
        self._note("eval", result.version, e.time, metrics)

    def _ended(self, e: ev.Ended) -> None:
        self.ended = True
        self.outcomes["evicted"] += len(self.groups)
        for state in (self.groups, self.taken, self.ready, self.leases, self.reopened, self.retries):
            state.clear()

    def _ignore(self, e: ev.AnyEvent) -> None:
        """Segments are the log's own business."""

    def _get(self, group: int) -> Group:
        found = self.find(group)
        assert found is not None, f"the log names group {group}, which is not outstanding"
        return found

    def _count_trained(self, groups: list[Group], update: int, sign: int) -> None:
        """Rollouts with a token that the update after `update` could train."""
        lengths = [r.length for group in groups for r in group.ok() if update - r.newest <= self.max_lag]
        self.lengths.trained += sign * len(lengths)
        self.lengths.trained_tokens += sign * sum(lengths)

    def _note(self, kind: Literal["step", "eval"], version: Version, time: float, metrics: dict[str, float]) -> None:
        sequence = len(self.records) + 1
        self.records.append(Record(sequence=sequence, time=time, kind=kind, version=version, metrics=metrics))


_APPLY: dict[type, Callable[[Ledger, Any], None]] = {
    ev.GroupReserved: Ledger._reserved,
    ev.GroupReissued: Ledger._reissued,
    ev.RolloutSubmitted: Ledger._submitted,
    ev.RolloutScored: Ledger._scored,
    ev.GroupSettled: Ledger._settled,
    ev.BatchLeased: Ledger._leased,
    ev.BatchCommitted: Ledger._committed,
    ev.LearnerFenced: Ledger._fenced,
    ev.CheckpointRetained: Ledger._retained,
    ev.EvalRequested: Ledger._eval_requested,
    ev.EvalPinned: Ledger._eval_pinned,
    ev.Evaluated: Ledger._evaluated,
    ev.Ended: Ledger._ended,
    ev.SegmentClosed: Ledger._ignore,
    ev.SegmentDropped: Ledger._ignore,
}


# ---------------------------------------------------------------------------------------------- book
# What the parts of the core share: the ledger, and the one way to change it.


class StoreContext:
    """`record` applies an event at once and remembers it; the core hands what was recorded to the log before it answers."""

    def __init__(self, plan: StorePlan, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        source = plan.source
        self.plan = plan
        self.clock = clock
        self.wall = wall
        self.order = PromptOrder(len(source.prompts), source.seed, source.shuffle, source.epochs)
        self.ledger = Ledger(plan.rule.max_lag)
        self.recorded: list[AnyEvent] = []

    def record(self, event: AnyEvent) -> None:
        self.ledger.apply(event)
        self.recorded.append(event)

    def exhausted(self) -> bool:
        """Whether no prompt is left to reserve: the epochs are over and nothing waits for another try."""
        total = self.order.total
        return total is not None and self.ledger.cursor >= total and not self.ledger.retries

    def may_retry(self, retry: int) -> bool:
        """Whether the prompt of a group with this `retry` may be tried once more."""
        return retry + 1 < self.plan.grouping.max_attempts
