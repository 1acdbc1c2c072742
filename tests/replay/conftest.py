"""Fakes for the store's tests: a clock that stands still, prompts, plans, rollouts, and a transport without a network."""

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from msgspec.structs import replace

from asyncrl.config import SamplingSpec
from asyncrl.lineage import Fence
from asyncrl.replay.context import Poll
from asyncrl.replay.core import StoreCore
from asyncrl.replay.log.pieces import PieceHead
from asyncrl.replay.log.rows import Summary, TrainScore
from asyncrl.replay.plan import EvalSetting, Evaluation, Source, StorePlan, keep_all
from asyncrl.staleness import Staleness
from asyncrl.types import (
    BatchLease,
    Key,
    Prompt,
    Rollout,
    RolloutPiece,
    Sampling,
    Score,
    Span,
    StoreReport,
    Ticket,
    Tokens,
    Version,
)

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8, stop_token_ids=(0,))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def prompts(count: int) -> list[Prompt]:
    return [Prompt(row=100 + i, ids=(1, 2, i), data_source="even" if i % 2 == 0 else "odd") for i in range(count)]


def plan(
    *,
    max_lag: int = 1,
    batch: int = 2,
    on_stale: str = "hold",
    selector: str = "oldest",
    size: int = 8,
    epochs: int | None = None,
    shuffle: bool = False,
    n: int = 2,
    min_valid: int = 1,
    max_attempts: int = 3,
    keep: Callable[[Sequence[float]], bool] = keep_all,
    evals: int = 0,
    ahead: int | None = None,
    masked: float = 0.0,
    lease_s: float = 30.0,
    max_empty_batches: int | None = None,
    baseline: bool = False,
    also: tuple[EvalSetting, ...] = (),
    metrics: tuple[Any, ...] = (),
    pinned: bool = True,
) -> StorePlan:
    rule = Staleness(
        max_lag=max_lag,
        batch_groups=batch,
        on_stale=on_stale,  # type: ignore[arg-type]
        selector=selector,  # type: ignore[arg-type]
        reserve_ahead=ahead,
        max_masked_share=masked,
    )
    settings = (EvalSetting("", SAMPLING), *also)
    held_out = Evaluation(prompts=prompts(evals), settings=settings, metrics=metrics, pinned=pinned)
    return StorePlan(
        rule=rule,
        source=Source(prompts=prompts(size), sampling=SAMPLING, seed=7, shuffle=shuffle, epochs=epochs),
        sampling=SamplingSpec(n=n, min_valid=min_valid, max_attempts=max_attempts, max_empty_batches=max_empty_batches),
        keep=keep,
        baseline=baseline,
        evaluation=held_out if evals else Evaluation(),
        lease_s=lease_s,
    )


def rollout(ticket: Ticket, index: int, version: Version, tokens: int = 3, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "group": ticket.group,
        "rollout": index,
        "attempt": ticket.attempt,
        "prompt": ticket.prompt,
        "response_ids": [5 + index] * (tokens - 1) + [0],
        "logprobs": [-0.5] * tokens,
        "kept_logmass": None,
        "loss_mask": [1] * tokens,
        "turns": (0,),
        "spans": (Span(version, tokens),),
        "finish_reason": "stop",
        "worker": "gen",
        "times": {"started": 1.0, "finished": 2.0},
        "purpose": ticket.purpose,
        "baseline": index == ticket.baseline,
    }
    return Rollout(**(fields | changes))


class FakeLog:
    """Holds events in memory; of all rows it has the same texts. calls: how many events there were after each call.
    snapshots: by how many events came before them. closes: whether a call of `append_events` closes a segment."""

    def __init__(
        self,
        events: list[Any],
        calls: list[int],
        snapshots: dict[int, bytes],
        closes: Callable[[], bool] = lambda: False,
        pieces: list[Tokens | None] | None = None,
    ) -> None:
        self.events, self.calls, self.snapshots, self.closes = events, calls, snapshots, closes
        self.pieces = [] if pieces is None else pieces
        newest = max((count for count in snapshots if count <= len(events)), default=0)
        self.state, self.history = snapshots.get(newest, b""), events[newest:]
        self.events_closed, self.due = len(events), bool(self.history)  # opening a log closes its tail
        self.synced = self.truncated_after = None  # the newest event when these were called

    def sync(self) -> None:
        self.synced = self.events[-1] if self.events else None

    def append_events(self, events: Sequence[Any]) -> None:
        self.events.extend(events)
        self.calls.append(len(self.events))
        self.due = self.closes()

    def snapshot(self, state: bytes) -> None:
        self.snapshots[len(self.events)] = state
        self.due = False

    def find(self, *kinds: type) -> Iterator[Any]:
        return (event for event in self.events if isinstance(event, kinds))

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> pa.RecordBatch:
        same = {
            "prompt": "p",
            "response": "r",
            "ground_truth": '"truth"',
            "ground_truth_is_json": True,
            "finish_reason": "stop",
        }
        return pa.RecordBatch.from_pylist([same] * len(rows)).select(columns)

    def truncate(self, needed: Iterable[int]) -> None:
        self.truncated_after = self.synced

    def trim(self, needed: Iterable[int]) -> None:
        for piece in set(range(len(self.pieces))).difference(needed):
            self.pieces[piece] = None

    def take_pieces(self, pieces: Sequence[int]) -> Tokens:
        first, *others = (self.pieces[piece] for piece in pieces)
        assert first is not None
        for piece in others:
            assert piece is not None
            lists = {name: getattr(first, name) + getattr(piece, name) for name in ("token_ids", "logprobs", "spans")}
            first = Tokens(**lists, kept_logmass=None)
        return first


class Bench:
    """A core with an in-memory log, and short words for what its callers do."""

    def __init__(self, plan_: StorePlan) -> None:
        self.plan, self.clock, self.log, self.rows = plan_, Clock(), list[Any](), 0
        self.calls: list[int] = []  # length of the log after each call
        self.snapshots: dict[int, bytes] = {}
        self.closes: Callable[[], bool] = lambda: False
        self.pieces: list[Tokens | None] = []
        self.sequence = 0
        self.core = self.build()

    def build(self) -> StoreCore:
        log = FakeLog(self.log, self.calls, self.snapshots, lambda: self.closes(), self.pieces)
        return StoreCore(self.plan, log, self.clock, wall=lambda: 5.0)  # type: ignore[arg-type]

    def call(self, verb: str, *args: Any, worker: str = "gen", incarnation: int = 1, learner: int = 0) -> Any:
        """As the store calls its core; a verb that waits is tried once."""
        self.sequence += 1
        key = Key(worker, incarnation, self.sequence, learner)
        self.core.expire()
        with self.recording():
            reply = self.core.verbs[verb](key, *args)
        if not isinstance(reply, Poll):
            return reply
        with self.recording():
            return reply.attempt()[1]

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self.core.context.recording():
            yield
        self.core.context.write()
        self.core.context.stirred.clear()  # nobody waits

    def sleep(self, seconds: float) -> None:
        """Time passes, and the store is awake: others call it meanwhile."""
        for _ in range(steps := math.ceil(seconds / (self.plan.lease_s / 10))):
            self.clock.now += seconds / steps
            self.core.expire()

    def reserve(self, k: int, update: int, worker: str = "gen", held: Sequence[int] = (), incarnation: int = 1) -> Any:
        """With weights of the learner's present incarnation."""
        version = Version(self.core.ledger.incarnation, update)
        return self.call("reserve", k, version, held, 0.0, worker=worker, incarnation=incarnation)

    def take(self, summaries: Sequence[Summary]) -> int:
        """Submits rows, of which there are only summaries; how many were taken."""
        accepted = self.core.scoring.acceptable(summaries)
        with self.recording():
            self.core.scoring.submitted([summaries[i] for i in accepted], self.rows)
        self.rows += len(accepted)
        return len(accepted)

    def stream(self, *pieces: RolloutPiece) -> int:
        """Hands over pieces of unfinished rollouts; how many were taken."""
        updates = [[span.version.update for span in p.spans] for p in pieces]
        heads = [
            PieceHead(p.group, p.rollout, p.attempt, p.start, len(of_it), min(of_it), max(of_it))
            for p, of_it in zip(pieces, updates, strict=True)
        ]
        following = self.core.streaming.following(heads)
        with self.recording():
            self.core.streaming.streamed([heads[i] for i in following], len(self.pieces))
        self.pieces += [pieces[i] for i in following]
        return len(following)

    def submit(
        self,
        ticket: Ticket,
        *updates: int,
        rollouts: Sequence[int] | None = None,
        problem: str = "",
        figures: dict[str, float] | None = None,
    ) -> int:
        """Rollouts whose tokens have these updates (one per token); how many were taken. figures: how their episodes went."""
        version = Version(self.core.ledger.incarnation, updates[0]) if len(set(updates)) == 1 else None
        return self.take(
            [
                Summary(
                    ticket.group,
                    i,
                    ticket.attempt,
                    min(updates),
                    max(updates),
                    len(updates),
                    version,
                    problem,
                    figures=figures,
                    incarnation=self.core.ledger.incarnation,
                )
                for i in (ticket.rollouts if rollouts is None else rollouts)
            ]
        )

    def lease_unscored(self, k: int, worker: str, incarnation: int) -> tuple[int, list[int]]:
        """(lease, log rows)."""
        self.core.expire()
        scoring = self.core.scoring
        scoring.take_back(worker, incarnation - 1)
        lease, items = scoring.lease(k, Key(worker, incarnation, 0))
        return lease, [scoring._row(*item) for item in items]

    def extend(self, lease: int, worker: str) -> None:
        self.call("extend", lease, worker=worker)

    def scored(self, lease: int, scores: Sequence[Score], first_row: int = 0) -> None:
        """Verdicts, whose rows stand in the log once more from `first_row` on where their tokens earned something."""
        with self.recording():
            self.core.scoring.scored(self.core.scoring.accepted(scores), first_row)
        self.call("score", lease, [replace(s, token_rewards=None) for s in scores])

    def fence(self, committed: int) -> Fence:
        return self.call("fence", committed)

    def lease_batch(self, incarnation: int, update: int) -> BatchLease:
        return self.call("lease_batch", update, 0.0, learner=incarnation)

    def ok_rows(self, incarnation: int, groups: Sequence[int]) -> list[tuple[int, TrainScore]]:
        self.core.ledger.check_learner(incarnation)
        return self.core.batches.ok_rows(groups)

    def commit(self, lease: int, version: Version, metrics: dict[str, float]) -> None:
        self.call("commit", lease, version, metrics)

    def request_eval(self, version: Version) -> None:
        self.call("request_eval", version)

    def checkpointed(self, oldest: int) -> None:
        self.call("checkpointed", oldest, learner=self.core.ledger.incarnation)

    def finish(self) -> None:
        self.call("finish")

    def report(self, since: int) -> StoreReport:
        return self.call("report", since)

    def state(self) -> dict[str, Any]:
        return self.call("state")

    def score(self, ticket: Ticket, *rewards: float | None) -> None:
        """One reward per rollout of the ticket; None: invalid."""
        self.call("score", 0, [score(ticket, i, r) for i, r in zip(ticket.rollouts, rewards, strict=True)])

    def ready(self, count: int, update: int) -> list[Ticket]:
        """Reserves, generates and scores `count` groups with weights at `update`."""
        tickets = list(self.reserve(count, update).tickets)
        assert len(tickets) == count
        for ticket in tickets:
            self.submit(ticket, update)
            self.score(ticket, *[1.0] * len(ticket.rollouts))
        return tickets

    def train(self, update: int) -> tuple[int, ...]:
        """Leases and commits the update after `update`; its groups."""
        incarnation = self.core.ledger.incarnation
        lease = self.lease_batch(incarnation, update)
        assert lease.groups, lease
        self.commit(lease.lease, Version(incarnation, update + 1), {"loss": 1.0})
        return lease.groups


def score(ticket: Ticket, index: int, reward: float | None, token_rewards: list[float] | None = None) -> Score:
    return Score(
        group=ticket.group,
        rollout=index,
        attempt=ticket.attempt,
        status="invalid" if reward is None else "ok",
        reward=reward,
        token_rewards=token_rewards,
    )


def piece(ticket: Ticket, index: int, start: int, *updates: int, incarnation: int = 1, ids: Sequence[int] = ()) -> RolloutPiece:
    """Tokens of these updates, from number `start` on."""
    return RolloutPiece(
        group=ticket.group,
        rollout=index,
        attempt=ticket.attempt,
        start=start,
        token_ids=[*ids] or [5 + index] * len(updates),
        logprobs=[-0.5] * len(updates),
        kept_logmass=None,
        spans=tuple(Span(Version(incarnation, update), 1) for update in updates),
    )


class Loop:
    """An event loop in a thread of its own, as an actor has it; a transport calls into it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def transport(self, store: Any) -> Callable[..., Any]:
        def call(verb: str, key: Key, *args: Any, timeout_s: float) -> Any:
            return asyncio.run_coroutine_threadsafe(store.call(verb, key, *args), self.loop).result(timeout_s)

        return call

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    """The builders above; test modules can't import them from each other."""
    builders = (Bench, Clock, FakeLog, plan, prompts, rollout, piece, score)
    return SimpleNamespace(**{builder.__name__: builder for builder in builders}, SAMPLING=SAMPLING)
