"""Batches for the learner: leased, committed, fenced, replayed after a restore."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import asyncrl.replay.log.events as ev
from asyncrl.errors import CheckpointError, Closed, ConfigError
from asyncrl.lineage import Fence, Lineage
from asyncrl.replay.admission import Holders
from asyncrl.replay.context import Poll, StoreContext
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.log.rows import TRAIN_COLUMNS, TrainRows, TrainScore, to_ipc
from asyncrl.replay.state import Group
from asyncrl.report.episodes import episode_metrics
from asyncrl.report.timing import TimeInState
from asyncrl.staleness import Staleness
from asyncrl.types import BatchLease, Key, Version, derive_seed

log = logging.getLogger(__name__)
_EMPTY_GROUPS, _EMPTY_BATCHES = 1024, 32  # without max_empty_batches the larger of the two ends the run


def stale(rule: Staleness, ledger: Ledger, update: int) -> list[Group]:
    """Groups that can't be trained after `update` any more. drop: all with a token past the bound, in flight or not; else
    ready ones without a trainable token, which only `mask` has, and `hold` among the groups that it went on without."""
    if rule.drops:
        return [g for g in ledger.untaken() if rule.overdue(oldest=g.oldest(), committed=update)]
    if rule.holds and not ledger.excused:
        return []
    ready = (ledger.groups[g] for g in ledger.ready)
    return [g for g in ready if (g.excused or not rule.holds) and rule.overdue(oldest=g.newest(), committed=update)]


def pick(rule: Staleness, ledger: Ledger, update: int, exhausted: bool, seed: int) -> tuple[int, ...]:
    """The batch that would be next, among ready groups that are not stale: those of the earliest deadlines, unless a selector
    says otherwise. () while there are too few: less than batch_groups only when no more can come."""
    size = rule.batch_groups
    last = exhausted and len(ledger.groups) == len(ledger.taken) + len(ledger.ready)
    if len(ledger.ready) < size and not last:
        return ()
    # After a restore some tokens may come from a lost lineage that was ahead: those groups wait until updates catch up.
    eligible = sorted(g for g in ledger.ready if ledger.groups[g].newest() <= update)
    if len(eligible) < size and not last:
        return ()
    if rule.selector == "uniform" and len(eligible) > size:
        eligible = random.Random(derive_seed(seed, update)).sample(eligible, size)
    else:
        sign = -1 if rule.selector == "freshest" else 1
        # Excused groups last: what is due must not be late for what nobody waits for.
        eligible.sort(key=lambda g: (ledger.groups[g].excused, sign * ledger.groups[g].oldest(), g))
    return tuple(sorted(eligible[:size]))


class Batches:
    """A batch lease ends only by its commit or by a newer incarnation of the learner. A learner that prefetches leases
    batches for consecutive updates ahead of its commits; replayed batches come first."""

    def __init__(self, context: StoreContext, holders: Holders, check: Callable[[], None]) -> None:
        """check: raises what a learner that waits for a batch is to be told."""
        self._context = context
        self._check = check
        self._ledger = context.ledger
        self._plan = context.plan
        self._holders = holders
        self.time = TimeInState("free", context.clock)  # whether a full batch is held back
        self._fenced: tuple[Key, Fence] | None = None  # the newest `fence` and its reply, which may have been lost

    def lineage(self, caller: Key) -> Lineage:
        return self._ledger.lineage()

    def fence(self, caller: Key, committed: int) -> Fence:
        """On the disk before anybody gets a version of the new incarnation: a power failure must not make it come again."""
        ledger = self._ledger
        if self._fenced is not None and self._fenced[0] == caller:
            return self._fenced[1]
        self._context.finished = False
        if committed > ledger.committed:
            raise CheckpointError(
                f"checkpoint at update {committed} > {ledger.committed} updates in the replay log: the log lost its end, or "
                "belongs to another run; resume from an older checkpoint"
            )
        if committed < ledger.retained:
            raise CheckpointError(
                f"checkpoint at update {committed} < {ledger.retained}, the oldest retained one: its rows are deleted; "
                "resume from a newer checkpoint"
            )
        self._context.record(ev.LearnerFenced(ledger.incarnation + 1, committed, self._context.wall()))
        for group in self._holders.misfits():  # the run goes on with a smaller max_lag
            self._context.record(ev.GroupSettled(group.id, "evicted", retry=True))
        self._context.write()
        self._context.log.sync()
        fence = Fence(incarnation=ledger.incarnation, committed=committed, reopened=len(ledger.reopened))
        self._fenced = (caller, fence)
        return fence

    def lease_batch(self, caller: Key, update: int, wait_s: float) -> Poll:
        """Waits for a batch. Asking again for the same update gets the same lease, so a lost reply loses nothing."""

        def attempt() -> tuple[bool, BatchLease]:
            lease = self._lease(caller.learner, update)
            return bool(lease.groups or lease.ended), lease

        return Poll(attempt, wait_s, "batch")

    def _lease(self, incarnation: int, update: int) -> BatchLease:
        ledger, rule = self._ledger, self._plan.rule
        ledger.check_learner(incarnation)
        if ledger.ended:
            return BatchLease(lease=0, groups=(), committed=ledger.committed, ended=True)
        for lease in ledger.leases.values():
            if lease.update == update:
                return self._leased(lease)
        expected = ledger.committed + len(ledger.leases)
        if update != expected:
            raise ValueError(
                f"lease_batch(update={update}), but the next batch is trained after update {expected}: "
                "lease batches in order, one per update"
            )
        if update in ledger.reopened:
            return self._grant(update, ledger.reopened[update], replayed=True)
        self._check()
        self._check_empty_groups()
        for group in stale(rule, ledger, update):
            retry = rule.drops and self._context.may_retry(group.retry)
            self._context.record(ev.GroupSettled(group.id, "evicted", retry))
        exhausted = self._context.exhausted()
        hopeless = self._stragglers_due(update)  # whichever batch would be picked
        groups = () if hopeless else pick(rule, ledger, update, exhausted, self._plan.source.seed)
        held_back = hopeless or (bool(groups) and not self._leaves_time(update, groups))
        self.time.enter("stragglers" if held_back else "free")
        if groups and not held_back:
            return self._grant(update, groups, replayed=False)
        ended = exhausted and len(ledger.groups) == len(ledger.taken)
        waiting_for = "stragglers" if held_back else "ready groups"
        return BatchLease(lease=0, groups=(), committed=ledger.committed, ended=ended, waiting_for=waiting_for)

    def _stragglers_due(self, update: int) -> bool:
        """Whether any full batch would leave too little time for others. Asked after every row and score while the
        learner waits, so it looks at no group."""
        rule, ready = self._plan.rule, len(self._ledger.ready)
        full = rule.holds and not rule.max_masked_share and ready >= rule.batch_groups
        return full and not self._holders.in_time_at_best(update + 1, rule.batch_groups)

    def _leaves_time(self, update: int, batch: Sequence[int]) -> bool:
        """Whether all others can still be trained in time after this batch, as the update after `update`. Excuses those that
        can't, if `max_masked_share` allows so many."""
        ledger, rule, deadline = self._ledger, self._plan.rule, self._holders.deadline
        if not rule.holds or self._holders.in_time(update + 1, batch):
            return True
        ended = sum(ledger.outcomes.values()) + len(batch)
        if ledger.excused + 1 > rule.max_masked_share * ended:
            return False
        others = [group for group in ledger.untaken() if group.id not in batch]
        ready_and_fresh_first = sorted(others, key=lambda g: (g.id not in ledger.ready, -deadline(g)))
        late = rule.misfits(((g.id, deadline(g)) for g in ready_and_fresh_first), update + 1)
        if ledger.excused + len(late) > rule.max_masked_share * ended:
            return False
        for group in late:
            self._context.record(ev.GroupExcused(group))
        return True

    def rows(self, caller: Key, groups: Sequence[int]) -> TrainRows:
        self._ledger.check_learner(caller.learner)
        found = self.ok_rows(groups)
        batch = self._context.log.take([row for row, _ in found], TRAIN_COLUMNS)
        return TrainRows(to_ipc(batch), [score for _, score in found])

    def ok_rows(self, groups: Sequence[int]) -> list[tuple[int, TrainScore]]:
        """(log row, score) of the `ok` sampled rollouts of leased groups. One whose tokens are all too old is among them: the
        learner masks it, and its reward still counts for its group's mean."""
        ledger = self._ledger
        leased = {g for lease in ledger.leases.values() for g in lease.groups}
        unknown = [g for g in groups if g not in leased]
        if unknown:
            raise ValueError(f"rows of groups {unknown[:5]}, which are not leased: only leased groups may be trained")
        found = []
        for group in (ledger.groups[g] for g in groups):
            greedy = group.baseline()
            baseline = None if greedy is None else greedy.earned
            found += [(r.row, TrainScore(r.reward, r.parts, baseline)) for r in group.ok()]
        return found

    def commit(self, caller: Key, lease: int, version: Version, metrics: Mapping[str, float]) -> None:
        """Idempotent: a commit that is already in the log changes nothing."""
        ledger = self._ledger
        ledger.check_learner(version.incarnation)
        done = ledger.commits.get(version.update)
        if done is not None and (done.lease, done.version) == (lease, version):
            return
        if ledger.ended:
            raise Closed(f"commit of update {version.update} after the run ended: its groups are settled")
        held = ledger.leases.get(lease)
        if held is None or held.update != ledger.committed or version.update != ledger.committed + 1:
            raise ValueError(
                f"commit(lease={lease}, version={version}) at {ledger.committed} updates: only the lease for update "
                f"{ledger.committed + 1} can be committed now; commit in the order of leasing"
            )
        sampled = [r for group in held.groups for r in ledger.groups[group].sampled()]
        episodes = episode_metrics([r.figures | {f"status/{r.status}": 1.0} for r in sampled if r.figures is not None])
        metrics = {name: float(value) for name, value in (*metrics.items(), *episodes.items())}
        self._context.record(ev.BatchCommitted(lease, version, held.groups, metrics, self._context.wall()))
        if held.replayed and metrics.get("gap/ess", 1.0) < ledger.min_ess:
            self._leave_old_log()

    def _leave_old_log(self) -> None:
        """From here on a fork generates anew. A batch that its learner has leased ahead is still trained."""
        ledger = self._ledger
        leased = {g for lease in ledger.leases.values() for g in lease.groups}
        unused = tuple(g for g in sorted(ledger.groups) if g < ledger.foreign and g not in leased)
        log.info("update %d: gap/ess < %g, so %d groups of the old log are left", ledger.committed, ledger.min_ess, len(unused))
        self._context.record(ev.GroupsUnused(unused))

    def checkpointed(self, caller: Key, oldest_retained: int) -> None:
        """In this order: the log is on the disk, with what it says here; then what no retained checkpoint needs is deleted."""
        ledger = self._ledger
        ledger.check_learner(caller.learner)
        if oldest_retained > ledger.committed:
            raise ValueError(f"checkpointed({oldest_retained}) > {ledger.committed} updates committed: commit before saving")
        if oldest_retained > ledger.retained:
            self._context.record(ev.CheckpointRetained(oldest_retained))
        self._context.write()
        self._context.log.sync()
        trained = (g for c in ledger.commits.values() for g in c.groups)
        self._context.log.truncate(r.row for g in chain(ledger.outstanding(), trained) for r in g.rollouts)
        self._context.log.trim(piece for g in ledger.outstanding() for r in g.rollouts for piece in r.pieces)

    def _check_empty_groups(self) -> None:
        """A reward that always raises, or rewards that never vary, would otherwise generate for ever. Each ready group
        since then allows as many empty groups again: what comes slowly still comes."""
        ledger, plan = self._ledger, self._plan
        size, batches = plan.rule.batch_groups, plan.sampling.max_empty_batches
        most = max(_EMPTY_GROUPS, _EMPTY_BATCHES * size) if batches is None else batches * size
        if ledger.empty_groups < most * (1 + len(ledger.ready)):
            return
        counts = ledger.counts()
        error = f"; the last error: {ledger.last_error}" if ledger.last_error else ""
        raise ConfigError(
            f"{ledger.empty_groups} groups since the last batch gave nothing to train on, {len(ledger.ready)} did; {most} in a "
            f"row end the run (sampling.max_empty_batches={batches or 'null'}; in all {counts.failed} had fewer rewards than "
            f"sampling.min_valid, or none for their baseline, and sampling.keep filtered {counts.filtered}): the learner would "
            "wait for ever; fix the reward function, or take easier prompts, sampling.keep='all' or a larger "
            f"sampling.max_empty_batches{error}"
        )

    def _grant(self, update: int, groups: tuple[int, ...], replayed: bool) -> BatchLease:
        lease = self._ledger.next_lease
        self._context.record(ev.BatchLeased(lease, update, groups, replayed))
        return self._leased(self._ledger.leases[lease])

    def _leased(self, lease: ev.BatchLeased) -> BatchLease:
        committed = self._ledger.committed
        return BatchLease(lease=lease.lease, groups=lease.groups, committed=committed, replayed=lease.replayed)
