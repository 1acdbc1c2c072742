"""Random schedules against the core: delays, late swaps, filtering, failures, lost workers, duplicates, learner and store
restarts, both orders of commit and publish. Whatever happens, the bound holds, every group ends once, and all drains."""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncrl.replay.batches import pick
from asyncrl.replay.core import StoreCore
from asyncrl.replay.ledger import to_record
from asyncrl.replay.log import events as ev
from asyncrl.replay.log.derived import Derivation, LogChanges
from asyncrl.replay.log.rows import Summary, TrainScore
from asyncrl.replay.plan import keep_varied
from asyncrl.types import Key, RolloutPiece, Score, Span, Ticket, Version


class Token(NamedTuple):
    """One that was sampled; no other has its number."""

    version: Version
    number: int


class FakeGenerator:
    def __init__(self, name: str) -> None:
        self.name, self.incarnation, self.version = name, 1, Version(1, 0)
        self.work: dict[int, tuple[Ticket, dict[int, list[Token]]]] = {}  # group -> the tokens so far

    def die(self) -> int:
        """Returns the incarnation that died."""
        self.incarnation, self.work = self.incarnation + 1, {}
        return self.incarnation - 1


class World:
    """Actors that act in random order. Trains through the very rule of asyncrl.staleness."""

    def __init__(
        self, fakes: SimpleNamespace, plan: Any, rng: random.Random, publish_first: bool, prefetch: int, deadly: set[int]
    ) -> None:
        """deadly: rows of prompts that a generator dies of."""
        self.bench, self.fake_log, self.deadly = fakes.Bench(plan), fakes.FakeLog, deadly
        chance = rng.choice((0.0, 0.02, 0.3, 1.0))
        self.bench.closes = lambda: rng.random() < chance
        self.heard = 0  # records of the store, by the driver
        self.rule, self.rng = plan.rule, rng
        self.first_rule = plan.rule  # that the run began with
        self.publish_first, self.prefetch = publish_first, prefetch
        self.generators = [FakeGenerator(f"g{i}") for i in range(3)]
        self.tokens: dict[int, list[int]] = {}  # log row -> updates of its tokens
        self.earned: dict[int, list[float]] = {}  # log row -> what its tokens earned, if anything
        self.trained: dict[int, list[Any]] = {}  # update -> rows and scores, surviving lineage
        self.undone: dict[int, list[Any]] = {}
        self.learner_deaths = rng.choice((0.0, 0.01, 0.02))
        self.leases: list[Any] = []
        self.scored: list[Score] = []
        self.incarnation = self.bench.fence(0).incarnation
        self.published = Version(1, 0)
        self.checkpoints = [0]
        self.ended = False
        self.ess = 1.0  # of what is trained
        self.forks = 0
        self.long = rng.random() < 0.5  # answers
        self.before: list[int] = []  # the token before each one, by number; -1: it was the first of its rollout
        self.kept: set[int] = set()  # those of rollouts that count
        self.resumed = 0  # tokens that rollouts went on from
        self.late: list[RolloutPiece] = []  # that come once more, or when it is too late

    # generators

    def reserve(self, g: FakeGenerator, k: int) -> None:
        answer = self.bench.call("reserve", k, g.version, list(g.work), 0.0, worker=g.name, incarnation=g.incarnation)
        for group in answer.cancelled:
            g.work.pop(group, None)
        self.resumed += sum(len(begun.token_ids) for ticket in answer.tickets for begun in ticket.begun.values())
        if self.rng.random() < 0.02:
            return  # the answer got lost
        for ticket in answer.tickets:
            assert ticket.group not in g.work
            g.work[ticket.group] = (ticket, {r: self.begun(ticket, r) for r in ticket.rollouts})

    def begun(self, ticket: Ticket, rollout: int) -> list[Token]:
        """From where a rollout goes on."""
        if (tokens := ticket.begun.get(rollout)) is None:
            return []
        assert ticket.purpose == "train"
        versions = [span.version for span in tokens.spans]
        assert [span.length for span in tokens.spans] == [1] * len(tokens.token_ids)
        return list(map(Token, versions, tokens.token_ids))

    def stream(self, g: FakeGenerator) -> None:
        """More of what is unfinished, from any place on; some of it comes late or twice, and then says what it always said."""
        pieces = self.rng.sample(self.late, min(2, len(self.late)))
        for ticket, rollouts in g.work.values():
            for index, tokens in rollouts.items():
                state = self.bench.core.ledger.find(ticket.group)
                known = state.rollouts[index].length if state is not None else 0
                start = known if self.rng.random() < 0.8 else self.rng.randint(0, len(tokens))
                if tokens[start:] and self.rng.random() < 0.5:
                    new = tokens[start:]
                    blank = {"logprobs": [0.0] * len(new), "kept_logmass": None, "group": ticket.group, "rollout": index}
                    spans = tuple(Span(token.version, 1) for token in new)
                    numbers = [token.number for token in new]
                    pieces.append(RolloutPiece(token_ids=numbers, spans=spans, start=start, attempt=ticket.attempt, **blank))
        self.late = [*self.late, *pieces][-8:]
        self.bench.stream(*pieces)

    def held_nothing(self, g: FakeGenerator) -> Any:
        return self.bench.call("reserve", 0, g.version, [], 0.0, worker=g.name, incarnation=g.incarnation)

    def die(self, g: FakeGenerator, noticed: bool) -> None:
        """noticed: by the supervisor; else its successor is the first to say so."""
        incarnation = g.die()
        if noticed:
            self.bench.call("forget", g.name, incarnation, worker="supervisor")

    def decode(self, g: FakeGenerator) -> None:
        if any(ticket.prompt.row in self.deadly for ticket, _ in g.work.values()):
            self.die(g, noticed=self.rng.random() < 0.9)
        for _, rollouts in g.work.values():
            for tokens in rollouts.values():
                if self.rng.random() < 0.5:
                    tokens.append(Token(g.version, len(self.before)))
                    self.before.append(tokens[-2].number if tokens[1:] else -1)

    def submit(self, g: FakeGenerator, finish: float) -> None:
        for group, (ticket, rollouts) in list(g.work.items()):
            for index, tokens in list(rollouts.items()):
                if tokens and self.rng.random() < finish:
                    for _ in range(self.rng.choice((1, 1, 2))):  # sometimes twice
                        self.deliver(ticket, index, tokens)
                    del rollouts[index]
            if not rollouts:
                del g.work[group]

    def deliver(self, ticket: Ticket, index: int, tokens: list[Token]) -> None:
        updates = [token.version.update for token in tokens]
        numbers = [token.number for token in tokens]
        assert [self.before[number] for number in numbers] == [-1, *numbers[:-1]]  # as they were sampled, none left out
        group = self.bench.core.ledger.groups.get(ticket.group)
        if self.incarnation == 1 and group is not None and group.attempt == ticket.attempt:
            assert min(updates) >= group.rollouts[index].oldest_at(
                group.update
            )  # only a restored learner can make tokens older than was reserved with
        problem = "finish_reason=abort" if self.rng.random() < 0.03 else ""
        versions = {token.version for token in tokens}
        version = tokens[0].version if len(versions) == 1 else None
        summary = Summary(ticket.group, index, ticket.attempt, min(updates), max(updates), len(updates), version, problem)
        row = self.bench.rows
        if self.bench.take([summary]):
            assert ticket.purpose == "train" or problem or versions == {ticket.pinned}
            assert self.kept.isdisjoint(numbers)  # each is in one rollout that counts
            self.kept.update(numbers)
            self.tokens[row] = updates

    # reward

    def reward(self, lose: float, invalid: float) -> None:
        lease, rows = self.bench.lease_unscored(self.rng.randint(1, 4), "r0", 1)
        if self.rng.random() < lose:
            return
        where = {e.row: e for e in self.bench.log if isinstance(e, ev.RolloutSubmitted)}
        scores = []
        for e in (where[row] for row in rows):
            bad = self.rng.random() < invalid
            reward, status = (None, "invalid") if bad else (float(self.rng.randint(0, 1)), "ok")
            score = Score(group=e.group, rollout=e.rollout, attempt=e.attempt, status=status, reward=reward)
            earned = [float(self.rng.randint(-1, 1)) for _ in range(e.length)] if self.rng.random() < 0.3 else None
            scores.append(replace(score, token_rewards=earned))
        self.scored += scores
        self.score(lease, scores + self.rng.sample(self.scored, min(2, len(self.scored))))

    def score(self, lease: int, scores: list[Score]) -> None:
        """As the store does it: rows whose tokens earned something are written again first."""
        first = self.bench.rows
        scoring = self.bench.core.scoring
        for s in (s for s in scoring.accepted(scores) if s.token_rewards):
            row = scoring._row(s.group, s.rollout)
            self.tokens[self.bench.rows], self.earned[self.bench.rows] = self.tokens[row], s.token_rewards
            self.bench.rows += 1
        self.bench.scored(lease, scores, first)

    # learner

    def lease(self) -> None:
        update = self.bench.core.ledger.committed + len(self.leases)
        if len(self.leases) > self.prefetch:
            return
        answer = self.bench.lease_batch(self.incarnation, update)
        assert answer == self.bench.lease_batch(self.incarnation, update)  # asking again changes nothing
        self.ended = answer.ended
        if not answer.groups:
            return
        rows = self.bench.ok_rows(self.incarnation, answer.groups)
        self.check(update, answer, rows)
        self.leases.append((answer, update, rows))

    def check(self, update: int, answer: Any, rows: list[Any]) -> None:
        assert rows
        assert rows == [told for group in answer.groups for told in self.told(group)]
        for group in answer.groups:
            lags = [[update - u for u in self.tokens[r.row]] for r in self.bench.core.ledger.groups[group].ok()]
            inside = [0 <= lag <= self.rule.max_lag for rollout in lags for lag in rollout]
            if answer.replayed and self.rule != self.first_rule:
                continue  # leased under the bound that the run began with; the learner masks what is too old for the new one
            assert any(inside)  # something to train
            if (self.rule.holds or self.rule.drops) and not self.bench.core.ledger.groups[group].excused:
                assert all(inside), (lags, self.rule)  # nothing is masked
        if answer.replayed:
            assert rows == self.undone[update + 1]
        if not answer.replayed and len(answer.groups) < self.rule.batch_groups:
            assert self.bench.core.context.exhausted()

    def told(self, group: int) -> list[Any]:
        """What the learner must get of a group: its sampled rollouts, each with what the baseline earned in all."""
        plan, rollouts = self.bench.plan, self.bench.core.ledger.groups[group].rollouts
        assert len(rollouts) == plan.sampling.n + plan.baseline
        assert all(r.status == "ok" for r in rollouts[plan.sampling.n :])
        baseline = [r.reward + sum(self.earned.get(r.row, ())) for r in rollouts[plan.sampling.n :]] or [None]
        return [(r.row, TrainScore(r.reward, r.parts, *baseline)) for r in rollouts[: plan.sampling.n] if r.status == "ok"]

    def commit(self, crash: bool = False) -> None:
        if not self.leases:
            return
        answer, update, rows = self.leases[0]
        version = Version(self.incarnation, update + 1)
        if self.publish_first:
            self.published = version
        if crash:
            return
        for _ in range(2):  # the answer got lost: again
            self.bench.commit(answer.lease, version, {"loss": 0.5, "gap/ess": self.ess})
        self.published = version
        self.leases.pop(0)
        self.trained[update + 1] = rows
        self.ess = self.rng.choice((1.0, 1.0, 0.4))
        if self.rng.random() < 0.2:
            self.bench.request_eval(version)
        if self.rng.random() < 0.3:
            self.checkpoints = [*self.checkpoints, update + 1][-2:]
            self.bench.checkpointed(self.checkpoints[0])

    def restart_learner(self) -> None:
        if not self.bench.core.ledger.ended:
            self.commit(crash=True)
        at = self.rng.choice([c for c in self.checkpoints if c <= self.bench.core.ledger.committed])
        self.checkpoints = [c for c in self.checkpoints if c <= at]
        fence = self.bench.fence(at)
        for update in [u for u in self.trained if u > at]:
            self.undone[update] = self.trained.pop(update)
        self.incarnation, self.leases, self.ended = fence.incarnation, [], False
        self.published = Version(fence.incarnation, at)

    def restart_store(self) -> None:
        """From its newest snapshot it is what it was; and what all events come to."""
        before = self.bench.core
        self.bench.core, whole = self.bench.build(), self.rebuilt(len(self.bench.log), {})
        for core in (before, self.bench.core, whole):
            core.verbs["report"](Key("supervisor", 1, 1), self.heard)
        before = before.ledger
        assert self.bench.core.ledger == before
        if self.rule != self.first_rule:  # under which what the first batches could train would be more
            whole.ledger.lengths = before.lengths
            for update, commit in before.commits.items():
                assert len(commit.groups) == len(whole.ledger.commits[update].groups)
                whole.ledger.commits[update].trained = commit.trained
                whole.ledger.commits[update].trained_tokens = commit.trained_tokens
        assert whole.ledger == before

    def rebuilt(self, end: int, snapshots: dict[int, bytes]) -> StoreCore:
        """Another store, of as many events."""
        return StoreCore(self.bench.plan, self.fake_log(self.bench.log[:end], [], dict(snapshots)), self.bench.clock)

    def restart_driver(self) -> None:
        """A driver that starts anew is told everything once more."""
        committed = [e for e in self.bench.log if isinstance(e, ev.BatchCommitted | ev.Evaluated)]
        records = list(self.bench.report(0).records)
        while len(more := self.bench.report(records[-1].sequence).records if records else ()):
            records += more
        assert records == [to_record(e, i) for i, e in enumerate(committed, 1)]
        self.heard = len(records)

    def pause_store(self) -> None:
        """Nobody could renew a lease, so nobody loses anything."""
        groups = self.bench.core.ledger.in_flight()
        before = [self.bench.core.holders.is_lost(g.id) for g in groups], self.bench.core.scoring.depths()
        self.bench.clock.now += 400
        self.bench.core.expire()
        assert ([self.bench.core.holders.is_lost(g.id) for g in groups], self.bench.core.scoring.depths()) == before

    def resume_with_a_smaller_bound(self) -> None:
        """Everything starts again: the store rebuilds under the new rule, generators and the learner are new."""
        smaller = self.rng.randint(0, self.rule.max_lag - 1)
        ahead = None if self.rule.reserve_ahead is None else min(self.rule.reserve_ahead, smaller + 1)
        self.rule = replace(self.rule, max_lag=smaller, reserve_ahead=ahead)
        self.bench.plan = replace(self.bench.plan, rule=self.rule)
        self.resume()

    def resume_run(self) -> None:
        """A clean end, and all over again from a checkpoint for more updates."""
        self.bench.finish()
        self.resume()

    def fork(self) -> None:
        """Another run goes on from any update of this one, also where it keeps no checkpoint, with what its log says."""
        ledger = self.bench.core.ledger
        at, log = self.rng.randint(0, ledger.committed), list(self.bench.log)
        changes = LogChanges(min_ess=self.rng.choice((0.0, 0.5)), live=self.rng.random() < 0.2)
        derived = Derivation(lambda: [(event, 5.0) for event in log], at)
        self.bench.log[:] = [event for event, _ in derived.events("another run", changes)]
        self.bench.calls[:] = [len(self.bench.log)]
        self.bench.snapshots.clear()
        self.heard, self.checkpoints = 0, [at]
        self.resume()
        now = self.bench.core.ledger
        assert (now.committed, now.reserved, now.incarnation) == (at, ledger.reserved, ledger.incarnation + 1)
        assert list(now.reopened.values()) == ([] if changes.live else derived.batches)
        assert (
            len(derived.batches)
            == ledger.committed + len(ledger.reopened) + sum(lease.replayed for lease in ledger.leases.values()) - at
        )
        self.forks += 1
        self.resumed = now.resumed_tokens  # another run knows nothing of pieces

    def resume(self) -> None:
        self.bench.core = self.bench.build()
        for g in self.generators:
            g.die()
        self.restart_learner()
        for g in self.generators:
            g.version = self.published

    def any_prefix(self) -> None:
        """A log that ends after any call is a sound store."""
        core = self.rebuilt(self.rng.choice([0, *self.bench.calls]), self.rng.choice(({}, self.bench.snapshots)))
        c = core.ledger.counts()
        assert c.reserved == c.trained + c.filtered + c.evicted + c.failed + c.unused + c.pending
        assert core.verbs["fence"](Key("learner", 1, 1), core.ledger.committed).committed == core.ledger.committed

    # all

    def invariants(self) -> None:
        ledger, holders = self.bench.core.ledger, self.bench.core.holders
        assert ledger.resumed_tokens == self.resumed
        c = ledger.counts()
        assert c.reserved == c.trained + c.filtered + c.evicted + c.failed + c.unused + c.pending
        assert len(ledger.groups) == c.pending
        if self.rule.holds:
            # As DESIGN says it: at most (j + 1)·B may be due after j more updates, for every j. None is overdue.
            due = [holders.deadline(g) - ledger.planned for g in ledger.untaken()]
            assert all(d >= 0 for d in due), due
            for j in range(self.rule.max_lag + 2):
                assert sum(d <= j for d in due) <= (j + 1) * self.rule.batch_groups, (due, self.rule)
            # Where no batch is picked because none could leave time, the one that would be picked does not.
            batches, update, seed = self.bench.core.batches, ledger.planned, self.bench.plan.source.seed
            if batches._stragglers_due(update):
                picked = pick(self.rule, ledger, update, self.bench.core.context.exhausted(), seed)
                assert not picked or not holders.in_time(update + 1, picked)
            in_flight = Counter(holders.deadline(g) for g in ledger.untaken() if g.id not in ledger.ready)
            assert +holders._outstanding.due_but(len(ledger.ready)) == in_flight

    def random_step(self) -> None:
        g, chance = self.rng.choice(self.generators), self.rng.random()
        if self.long and self.rng.random() < 0.3:  # so that there is something to go on with, and somebody has to
            self.rng.choice((self.stream, self.stream, self.decode, lambda g: self.die(g, noticed=True)))(g)
            return
        if chance < 0.25:
            self.reserve(g, self.rng.randint(0, 4))
        elif chance < 0.45:
            self.decode(g)
        elif chance < 0.52:
            self.stream(g)
        elif chance < 0.60:
            self.submit(g, finish=0.1 if self.long else 0.4)
        elif chance < 0.68:
            g.version = max(self.published, g.version) if self.rng.random() < 0.9 else g.version
        elif chance < 0.78:
            self.reward(lose=0.1, invalid=0.1)
        elif chance < 0.86:
            self.lease()
        elif chance < 0.93:
            self.commit()
        elif chance < 0.938:
            self.heard = max([self.heard, *(r.sequence for r in self.bench.report(self.heard).records)])
        elif chance < 0.94:
            self.restart_driver()
        elif chance < 0.95:
            self.die(g, noticed=self.rng.random() < 0.5)
        elif chance < 0.953:
            self.bench.sleep(40)  # everybody's lease runs out
        elif chance < 0.955:
            self.pause_store()
        elif chance < 0.955 + self.learner_deaths:
            self.restart_learner()
        elif chance > 0.995:
            self.resume_run()
        elif chance > 0.985:
            self.restart_store()
        elif chance > 0.982 and self.rule.holds and self.rule.max_lag:
            self.resume_with_a_smaller_bound()
        elif chance > 0.975:
            self.fork()

    def drain(self) -> None:
        for _ in range(400):
            for g in self.generators:
                g.version = max(self.published, g.version)
                self.reserve(g, 4)
                for _ in range(3):
                    self.decode(g)
                self.stream(g)
                self.submit(g, finish=1.0)
            for _ in range(8):
                self.reward(lose=0.0, invalid=0.0)
            self.bench.clock.now += 1
            self.lease()
            self.commit()
            self.invariants()
            if self.ended and not self.leases:
                self.bench.finish()
            if all(self.held_nothing(g).ended for g in self.generators):
                assert self.bench.core.ledger.round is None  # every evaluation that was asked for has run
                return
        raise AssertionError(f"did not drain: {self.bench.state()}")


MODES: list[dict[str, Any]] = [
    {"max_lag": 0},
    {"max_lag": 1},
    {"max_lag": 4},
    {"max_lag": 4, "ahead": 2},
    {"max_lag": 6, "ahead": 3},
    {"max_lag": 2, "ahead": 1},
    {"max_lag": 2, "on_stale": "wait"},
    {"max_lag": 3, "ahead": 3, "masked": 0.1},
    {"max_lag": 1, "masked": 0.3},
    {"max_lag": 2, "masked": 0.5},
    {"max_lag": 1, "on_stale": "mask"},
    {"max_lag": 4, "on_stale": "mask", "selector": "freshest"},
    {"max_lag": 4, "on_stale": "mask", "ahead": 3},
    {"max_lag": 1, "on_stale": "drop"},
    {"max_lag": 4, "on_stale": "drop", "selector": "uniform"},
    {"max_lag": 4, "on_stale": "drop"},
]


@given(
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(MODES),
    batch=st.integers(1, 3),
    publish_first=st.booleans(),
    prefetch=st.integers(0, 1),
    filtering=st.booleans(),
    baseline=st.booleans(),
    deadly=st.sets(st.integers(100, 109), max_size=2),
    steps=st.integers(50, 300),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_schedule_keeps_the_bound_and_drains(
    fakes: SimpleNamespace,
    seed: int,
    mode: dict[str, Any],
    batch: int,
    publish_first: bool,
    prefetch: int,
    filtering: bool,
    baseline: bool,
    deadly: set[int],
    steps: int,
) -> None:
    options = mode | {"baseline": baseline} | ({"keep": keep_varied} if filtering else {})
    plan = fakes.plan(batch=batch, size=10, epochs=2, shuffle=True, evals=2, **options)
    world = World(fakes, plan, random.Random(seed), publish_first, prefetch, deadly)
    for _ in range(steps):
        world.random_step()
        world.invariants()
    world.drain()
    world.restart_store()
    world.restart_driver()

    world.any_prefix()
    counts, log = world.bench.core.ledger.counts(), world.bench.log
    assert counts.pending == 0
    assert counts.trained == sum(len(e.groups) for e in _surviving(log))
    train = [e for e in log if isinstance(e, ev.GroupReserved) and e.purpose == "train"]
    assert len(train) == counts.reserved
    ends = _ends(log)
    assert sorted(ends) == [e.group for e in train]  # every reservation ended, once
    tries = {position: [e for e in train if e.position == position] for position in range(20)}
    assert [e.position for e in train if e.group == tries[e.position][0].group] == list(range(20))  # both epochs, in order
    for attempts in tries.values():  # each prompt once, but for retries and what a clean end left over, which a resume takes up
        assert [e.retry for e in attempts] == list(accumulate((ends[e.group] != "left over" for e in attempts[:-1]), initial=0))
        assert ends[attempts[-1].group] != "left over"


def _ends(log: list[Any]) -> dict[int, str]:
    """How every training group ended in the surviving lineage; `left over` by a clean end."""
    train = {e.group for e in log if isinstance(e, ev.GroupReserved) and e.purpose == "train"}
    ends: dict[int, str] = {}
    pending: set[int] = set()
    trained: dict[int, tuple[int, ...]] = {}  # by update

    def end(groups: Iterable[int], outcome: str) -> None:
        assert pending.issuperset(groups)
        pending.difference_update(groups)
        ends.update(dict.fromkeys(groups, outcome))

    for event in log:
        if isinstance(event, ev.GroupReserved) and event.group in train:
            pending.add(event.group)
        elif isinstance(event, ev.GroupSettled) and event.group in train:
            end([event.group], event.outcome)
        elif isinstance(event, ev.BatchCommitted):
            end(event.groups, "trained")
            trained[event.version.update] = event.groups
        elif isinstance(event, ev.LearnerFenced):
            for update in [u for u in trained if u > event.committed]:
                undone = trained.pop(update)
                pending.update(undone)
                for group in undone:
                    del ends[group]
        elif isinstance(event, ev.Ended | ev.GroupsUnused):
            end(list(pending) if isinstance(event, ev.Ended) else event.groups, "left over")
    assert not pending
    return ends


def _surviving(log: list[Any]) -> list[ev.BatchCommitted]:
    commits: dict[int, ev.BatchCommitted] = {}
    for event in log:
        if isinstance(event, ev.BatchCommitted):
            commits[event.version.update] = event
        elif isinstance(event, ev.LearnerFenced):
            commits = {u: c for u, c in commits.items() if u <= event.committed}
    return list(commits.values())
