"""The ledger: the durable state of the store, which is what the log says and nothing else. `apply` is the only way it changes.

Leases of workers, deadlines and waiters are not in it: they die with the process, and nothing is lost with them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec

import asyncrl.replay.log.events as ev
from asyncrl.errors import Fenced
from asyncrl.lineage import Lineage
from asyncrl.replay.state import Commit, EvalRound, Group, Lengths, PromptKey, RolloutState
from asyncrl.types import GroupCounts, Outcome, Record, Version

NOTED = (ev.BatchCommitted, ev.Evaluated)  # events of which a record tells the driver


@dataclass
class Ledger:
    """What the log says, as state."""

    max_lag: int  # only for `lengths`: those of the batches that are trained from now on
    groups: dict[int, Group] = field(default_factory=dict)  # outstanding training groups by id, which rises with their age
    taken: set[int] = field(default_factory=set)  # those of them that are leased to a learner or reopened
    ready: set[int] = field(default_factory=set)  # scored, kept and not taken
    cursor: int = 0  # position of the next new prompt
    retries: list[tuple[int, int]] = field(default_factory=list)  # (position, retry) to reserve before new prompts
    leases: dict[int, ev.BatchLeased] = field(default_factory=dict)  # of the newest learner, by number
    # The groups of batches whose commits a restore undid, by the update after which they are trained again; it rises.
    reopened: dict[int, tuple[int, ...]] = field(default_factory=dict)
    commits: dict[int, Commit] = field(default_factory=dict)  # by update, since the oldest retained checkpoint
    committed: int = 0
    retained: int = 0
    incarnation: int = 0
    fences: dict[int, int] = field(default_factory=dict)  # where each learner started, in updates, by incarnation; it rises
    next_group: int = 0
    next_lease: int = 1
    reserved: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(get_args(Outcome), 0))  # of settled groups
    round: EvalRound | None = None
    queued: Version | None = None
    excused: int = 0  # groups that nobody waited for, in all
    empty_groups: int = 0  # failed or filtered since the last batch or start
    last_error: str = ""  # of the newest rollout without a reward
    records: list[Record] = field(default_factory=list)  # the newest, which `report` has not told yet or not heard of again
    noted: int = 0  # records in all
    lengths: Lengths = field(default_factory=Lengths)
    died: int = 0  # workers that died with something in flight
    deaths: dict[PromptKey, set[int]] = field(default_factory=dict)  # which of those, by what was in flight there, and still is
    given_up: dict[PromptKey, str] = field(default_factory=dict)  # prompts that were in flight in too many, and the message
    workers: dict[str, int] = field(default_factory=dict)  # newest incarnation that held a group
    ended: bool = False
    foreign: int = 0  # groups below this one came with another run's log
    resumed_tokens: int = 0  # that reissued rollouts went on from, and, at the most, that were sampled again
    lost_tokens: int = 0
    min_ess: float = 0.0  # below which a batch of theirs ends their use; 0: nothing is left of them, or nothing ends it

    def dump(self) -> bytes:
        """For `load`, which makes an equal one of it."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def load(dumped: bytes, max_lag: int) -> "Ledger":
        ledger = _decoder.decode(dumped)
        ledger.max_lag = max_lag
        return ledger

    def find(self, group: int) -> Group | None:
        """A group that is still outstanding, for training or evaluation."""
        found = self.groups.get(group)
        return self.round.groups.get(group) if found is None and self.round is not None else found

    def get(self, group: int) -> Group:
        """A group that must be outstanding."""
        found = self.find(group)
        assert found is not None, f"group {group} is not outstanding"
        return found

    def check_learner(self, incarnation: int) -> None:
        """Raises `Fenced` for any learner but the newest."""
        if incarnation != self.incarnation:
            raise Fenced(
                f"learner incarnation {incarnation} is not the newest ({self.incarnation}): another learner took over; stop"
            )

    def lineage(self) -> Lineage:
        """A learner's updates count as far as the next one's start, and so on."""
        newest, last = {}, self.committed
        for incarnation, start in reversed(self.fences.items()):
            newest[incarnation] = last
            last = min(last, start)
        return Lineage(oldest=self.retained, newest=newest)

    def outstanding(self) -> list[Group]:
        """Every group that is not settled, for training and evaluation."""
        return [*self.groups.values(), *(self.round.groups.values() if self.round else ())]

    def in_flight(self) -> list[Group]:
        """Groups with rollouts still to come, for training and evaluation."""
        return [group for group in self.outstanding() if group.in_flight()]

    def counts(self) -> GroupCounts:
        return GroupCounts(reserved=self.reserved, pending=len(self.groups), **self.outcomes)

    def deaths_of(self, prompt: PromptKey) -> int:
        """How many workers died while it was in flight with them."""
        return len(self.deaths.get(prompt, ()))

    @property
    def planned(self) -> int:
        """Updates that are made before a group can be trained that is in no batch yet: committed, leased and reopened ones."""
        return self.committed + len(self.leases) + len(self.reopened)

    def untaken(self) -> list[Group]:
        """Outstanding training groups that are in no batch yet."""
        return [group for group in self.groups.values() if group.id not in self.taken]

    def apply(self, event: ev.Event) -> None:
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
            self.round.unscored += 1
            return
        self.groups[e.group] = group
        self.reserved += 1
        if e.position < self.cursor:
            self.retries.remove((e.position, e.retry))
        else:
            self.cursor = e.position + 1

    def _reissued(self, e: ev.GroupReissued) -> None:
        group = self.get(e.group)
        group.attempt, group.update, group.worker, group.incarnation = e.attempt, e.update, e.worker, e.incarnation
        self.workers[e.worker] = max(e.incarnation, self.workers.get(e.worker, 0))
        for rollout in e.dropped:
            group.rollouts[rollout].begin_anew()
        self.resumed_tokens += sum(group.rollouts[rollout].length for rollout in group.missing())
        self.lost_tokens += e.lost

    def _died(self, e: ev.HolderDied) -> None:
        self.died += 1
        for group in (self.get(g) for g in e.groups):
            self.deaths.setdefault(group.prompt, set()).add(self.died)
            if group.worker == e.worker and group.incarnation <= e.incarnation:
                group.worker = ""

    def _streamed(self, e: ev.RolloutStreamed) -> None:
        r = self.get(e.group).rollouts[e.rollout]
        r.oldest = min(r.oldest, e.oldest) if r.pieces else e.oldest
        r.newest, r.length, r.pieces = max(r.newest, e.newest), r.length + e.length, [*r.pieces, e.piece]

    def _submitted(self, e: ev.RolloutSubmitted) -> None:
        group = self.get(e.group)
        r = group.rollouts[e.rollout]
        r.row, r.attempt, r.oldest, r.newest, r.length = e.row, e.attempt, e.oldest, e.newest, e.length
        r.figures, r.pieces = e.figures, []
        group.unsubmitted -= 1
        if not group.in_flight():
            self.deaths.pop(group.prompt, None)  # it has done no harm
        if group.purpose == "train" and e.rollout < group.n:
            self.lengths.dispatched += 1
            self.lengths.dispatched_tokens += e.length

    def _scored(self, e: ev.RolloutScored) -> None:
        group = self.get(e.group)
        r = group.rollouts[e.rollout]
        r.status, r.reward, r.parts = e.status, 0.0 if e.reward is None else e.reward, e.parts
        if e.row is not None:
            r.row, r.token_sum = e.row, e.token_sum
        group.unscored -= 1
        self.last_error = e.error or self.last_error
        if not group.scored():
            return
        if group.purpose == "train":
            self.ready.add(e.group)
        elif self.round is not None:
            self.round.unscored -= 1

    def _settled(self, e: ev.GroupSettled) -> None:
        group = self.get(e.group)
        if e.error and group.prompt not in self.given_up:
            self.given_up[group.prompt] = e.error
            explained = self.deaths.pop(group.prompt)
            for deaths in self.deaths.values():
                deaths.difference_update(explained)
        if group.purpose == "eval":
            assert self.round is not None
            self.round.unscored += group.scored()
            group.give_up()
            self.round.unscored -= group.scored()
            return
        del self.groups[e.group]
        self.ready.discard(e.group)
        self.outcomes[e.outcome] += 1
        self.empty_groups += e.outcome != "evicted"
        if e.retry:
            self.retries.append((group.position, group.retry + 1))

    def _excused(self, e: ev.GroupExcused) -> None:
        self.groups[e.group].excused = True
        self.excused += 1

    def _leased(self, e: ev.BatchLeased) -> None:
        self.leases[e.lease] = e
        self.next_lease = e.lease + 1
        self.empty_groups = 0
        self.taken.update(e.groups)
        self.ready.difference_update(e.groups)
        if e.replayed:
            del self.reopened[e.update]

    def _committed(self, e: ev.BatchCommitted) -> None:
        lease = self.leases.pop(e.lease)
        groups = [self.groups.pop(g) for g in lease.groups]
        self.taken.difference_update(lease.groups)
        self.committed = e.version.update
        # Rollouts with a token that this update could train.
        lengths = [r.length for g in groups for r in g.ok() if e.version.update - 1 - r.newest <= self.max_lag]
        self.commits[e.version.update] = Commit(e.lease, e.version, groups, len(lengths), sum(lengths))
        self._count_trained(self.commits[e.version.update], 1)
        self._note(e)

    def _fenced(self, e: ev.LearnerFenced) -> None:
        """Void leases become ready, or reopened again; commits after the checkpoint are reopened before those."""
        self.incarnation = e.incarnation
        self.fences[e.incarnation] = e.committed
        self.ended, self.empty_groups = False, 0
        again = dict(self.reopened)
        for lease in self.leases.values():
            if lease.replayed:
                again[lease.update] = lease.groups
            else:
                self.taken.difference_update(lease.groups)
                self.ready.update(lease.groups)
        self.leases.clear()
        for update in [u for u in self.commits if u > e.committed]:
            undone = self.commits.pop(update)
            again[update - 1] = tuple(g.id for g in undone.groups)
            self.groups.update((g.id, g) for g in undone.groups)
            self._count_trained(undone, -1)
        self.reopened = dict(sorted(again.items()))
        self.taken.update(g for groups in self.reopened.values() for g in groups)
        self.committed = e.committed

    def _retained(self, e: ev.CheckpointRetained) -> None:
        self.retained = e.oldest
        self.commits = {u: c for u, c in self.commits.items() if u > e.oldest}

    def _eval_requested(self, e: ev.EvalRequested) -> None:
        if self.round is None or not self.round.groups:
            self.round = EvalRound(e.version)
        elif self.round.version != e.version:
            self.queued = e.version

    def _eval_pinned(self, e: ev.EvalPinned) -> None:
        self.round = EvalRound(e.version)
        if self.queued is not None and self.queued <= e.version:
            self.queued = None

    def _evaluated(self, e: ev.Evaluated) -> None:
        self.round = None if self.queued is None else EvalRound(self.queued)
        self.queued = None
        self._note(e)

    def _ended(self, e: ev.Ended) -> None:
        """What is outstanding is not used. If the run is resumed for more updates, its prompts come first."""
        self.ended = True
        self.outcomes["unused"] += len(self.groups)
        self.retries[:0] = [(g.position, g.retry) for _, g in sorted(self.groups.items())]
        for state in (self.groups, self.taken, self.ready, self.leases, self.reopened):
            state.clear()

    def _groups_unused(self, e: ev.GroupsUnused) -> None:
        given_up = [self.groups.pop(g) for g in e.groups]
        self.outcomes["unused"] += len(given_up)
        self.retries[:0] = [(g.position, g.retry) for g in given_up]
        self.taken.difference_update(e.groups)
        self.ready.difference_update(e.groups)
        for update, groups in [*self.reopened.items()]:
            if not set(groups).isdisjoint(e.groups):  # the fork's own that were in a batch with these wait for another one
                del self.reopened[update]
                own = set(groups).difference(e.groups)
                self.taken -= own
                self.ready |= own
        self.min_ess = 0.0

    def _forked(self, e: ev.LogForked) -> None:
        self.incarnation, self.foreign, self.min_ess = e.incarnation, self.next_group, e.min_ess
        self.reopened = dict(enumerate(e.batches, e.update))
        groups = {g for batch in e.batches for g in batch}
        self.taken.update(groups)
        self.ready.difference_update(groups)

    def _segment_closed(self, e: ev.SegmentClosed) -> None:
        """Segments are the log's own business."""

    def _segment_dropped(self, e: ev.SegmentDropped) -> None: ...

    def _count_trained(self, commit: Commit, sign: int) -> None:
        self.outcomes["trained"] += sign * len(commit.groups)
        self.lengths.trained += sign * commit.trained
        self.lengths.trained_tokens += sign * commit.trained_tokens

    def _note(self, e: ev.BatchCommitted | ev.Evaluated) -> None:
        self.noted += 1
        self.records.append(to_record(e, self.noted))


def to_record(e: ev.BatchCommitted | ev.Evaluated, sequence: int) -> Record:
    """sequence: how many of these two kinds of events there were up to this one."""
    if isinstance(e, ev.BatchCommitted):
        return Record(sequence=sequence, time=e.time, kind="step", version=e.version, metrics=e.metrics)
    metrics: dict[str, float] = {}
    for name, result in {"": e.result, **e.also}.items():
        at = f"eval/{name}/" if name else "eval/"
        metrics |= {f"{at}score": result.score, f"{at}count": result.count, f"{at}invalid": result.invalid}
        metrics |= {f"{at}timeout": result.timeout, f"{at}length": result.mean_length}
        metrics |= {f"{at}score/{source}": score for source, score in result.by_source.items()}
        metrics |= {f"{at}{more}": value for more, value in result.more.items()}
    return Record(sequence=sequence, time=e.time, kind="eval", version=e.result.version, metrics=metrics)


_decoder = msgspec.msgpack.Decoder(Ledger)

# An event is applied by the method that bears its tag.
_APPLY: dict[type, Callable[[Ledger, Any], None]] = {
    event: getattr(Ledger, f"_{event.__struct_config__.tag}") for event in ev.Event.__subclasses__()
}
