"""Who waits in the store, who is woken by what, and what a thousand who wait cost those who do not."""

import asyncio
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.config import StoreSpec
from asyncrl.errors import Closed, Fenced, Unavailable
from asyncrl.replay.log import rows as schema
from asyncrl.replay.store import ReplayStore
from asyncrl.staleness import Staleness
from asyncrl.types import Key, Version

V = Version(1, 0)


class World:
    """A store whose attempts to end a wait, and whose writes, are counted."""

    def __init__(self, fakes: SimpleNamespace, folder: Path, spec: StoreSpec = StoreSpec(), **options: Any) -> None:
        self.fakes, self.store, self.sequence = fakes, ReplayStore(fakes.plan(**options), folder, spec), 0
        self.tried: Counter[str] = Counter()  # by verb
        self.writes: list[int] = []  # events of each
        attempt, append = self.store._try, self.store._log.append_events

        def counted(waiter: Any, last: bool = False) -> None:
            self.tried[waiter.stream[0]] += 1
            attempt(waiter, last)

        def noted(events: Any) -> None:
            self.writes.append(len(events))
            append(events)

        self.store._try, self.store._log.append_events = counted, noted  # type: ignore[method-assign]

    async def __call__(self, worker: str, verb: str, *args: Any, incarnation: int = 1, learner: int = 1) -> Any:
        self.sequence += 1
        return await self.store.call(verb, Key(worker, incarnation, self.sequence, learner), *args)

    async def waits(self, worker: str, verb: str, *args: Any) -> "asyncio.Task[Any]":
        task, count = asyncio.ensure_future(self(worker, verb, *args)), len(self.store._waiters.get("all", ()))
        while len(self.store._waiters.get("all", ())) == count:
            await asyncio.sleep(0)
        return task

    async def submit(self, *tickets: Any) -> None:
        made = [self.fakes.rollout(t, i, V) for t in tickets for i in t.rollouts]
        await self("gen", "submit", schema.encode_rollouts(made, "run"))

    async def score(self, ticket: Any, *rewards: float) -> None:
        await self("reward", "score", 0, [self.fakes.score(ticket, i, reward) for i, reward in enumerate(rewards)])


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_only_who_can_go_on_is_asked(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(fakes, tmp_path, max_lag=0, batch=4, n=2, min_valid=1, keep=lambda rewards: min(rewards) > 0)
        await world("learner", "fence", 0)
        a, b, c, _ = (await world("gen", "reserve", 9, V, (), 1.0)).tickets
        waiting = [await world.waits(f"g{i}", "reserve", 1, V, (), 60.0) for i in range(200)]
        world.tried.clear()
        await world.submit(a, b, c)
        await world.score(a, 1.0, 1.0)
        assert not world.tried  # 200 generators wait, and none can have anything of this
        batch = await world.waits("learner", "lease_batch", 0, 60.0)
        world.tried.clear()
        await world.score(b, 1.0, 0.0)  # filtered: there is room for one
        assert len((await waiting[0]).tickets) == 1  # for who came first
        assert world.tried == {"reserve": 1, "lease_batch": 1}
        await world.score(c, 1.0, 0.0)
        assert len((await waiting[1]).tickets) == 1
        assert not batch.done()
        assert sum(task.done() for task in waiting) == 2
        await world.store.close()
        assert {type(e) for e in await asyncio.gather(batch, *waiting[2:], return_exceptions=True)} == {Closed}
        assert not world.store._waiters

    run(scenario)


def test_nobody_polls_while_nothing_changes(fakes: SimpleNamespace, tmp_path: Path) -> None:
    """One look at the leases per tenth of a lease, however many wait."""

    async def scenario() -> None:
        world, looks = World(fakes, tmp_path, max_lag=0, batch=1, lease_s=1.0), 0
        expire = world.store._core.expire

        def counted() -> None:
            nonlocal looks
            looks += 1
            expire()

        await world("gen", "reserve", 1, V, (), 1.0)
        waiting = [await world.waits(f"g{i}", "reserve", 1, V, (), 0.45) for i in range(50)]
        world.tried.clear()
        world.store._core.expire = counted  # type: ignore[method-assign]
        assert {answer.waiting_for for answer in await asyncio.gather(*waiting)} == {"bound full"}
        assert world.tried["reserve"] == 50  # each once, at its deadline
        assert looks <= 6

    run(scenario)


def test_what_many_call_at_a_time_is_written_together(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(fakes, tmp_path, max_lag=4, batch=8, size=80)
        tickets = (await world("gen", "reserve", 20, V, (), 1.0)).tickets
        assert world.writes == [20]
        await world.submit(tickets[0])
        assert world.writes == [20, 2]  # alone, at once
        await asyncio.gather(*(world.submit(ticket) for ticket in tickets[1:]))
        assert world.writes == [20, 2, 38]

    run(scenario)


def test_what_many_call_at_a_time_is_synced_together(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fsync: call`: no reply goes out before rows and events are on the disk, which they reach once for all."""

    async def scenario() -> None:
        world = World(fakes, tmp_path, StoreSpec(fsync="call"), max_lag=4, batch=8, size=80)
        tickets = (await world("gen", "reserve", 20, V, (), 1.0)).tickets
        await world.submit(tickets[0])
        synced, real = list[str](), os.fsync

        def fsync(descriptor: int) -> None:
            synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        await asyncio.gather(*(world.submit(ticket) for ticket in tickets[1:]))
        assert synced == ["rows", "events"]

    run(scenario)


def test_a_write_that_fails_is_told_to_all_whose_calls_were_in_it(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(fakes, tmp_path, max_lag=4, batch=8, size=80)
        tickets = (await world("gen", "reserve", 40, V, (), 1.0)).tickets
        waits = await world.waits("other", "reserve", 1, V, (), 60.0)

        def fails(events: Any) -> None:
            raise OSError("gone")

        world.store._log.append_events = fails  # type: ignore[method-assign]
        ends = await asyncio.gather(*(world.submit(t) for t in tickets[:3]), waits, return_exceptions=True)
        assert [type(end) for end in ends] == [Unavailable] * 4

    run(scenario)


def test_who_died_or_gave_up_waits_no_longer(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(fakes, tmp_path, max_lag=0, batch=1)
        (ticket,) = (await world("gen", "reserve", 1, V, (), 1.0)).tickets
        died, cancelled = await world.waits("a", "reserve", 1, V, (), 60.0), await world.waits("b", "reserve", 1, V, (), 60.0)
        older = await world.waits("c", "reserve", 1, V, (), 60.0)
        cancelled.cancel()
        await world("supervisor", "forget", "a", 1)
        with pytest.raises(Fenced):
            await died
        await world("c", "reserve", 0, V, (), 0.0, incarnation=2)
        assert await older is None
        assert not world.store._waiters
        heir = await world.waits("d", "reserve", 1, V, (), 60.0)
        await world("supervisor", "forget", "gen", 1)
        assert [t.group for t in (await heir).tickets] == [ticket.group]  # none of the others took it

    run(scenario)


def test_a_reserve_is_recalled_also_when_it_comes_late(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(fakes, tmp_path, max_lag=0, batch=1)
        (ticket,) = (await world("gen", "reserve", 1, V, (), 1.0)).tickets
        waits, other = await world.waits("a", "reserve", 1, V, (), 60.0), await world.waits("b", "reserve", 1, V, (), 60.0)
        await world("a", "recall")
        assert (await waits).waiting_for == "bound full"
        assert not other.done()
        await world.store.call("recall", Key("gen", 1, 99))
        assert (await world.store.call("reserve", Key("gen", 1, 98), 0, V, (ticket.group,), 60.0)).cancelled == ()
        again = await world.waits("a", "reserve", 1, V, (), 60.0)  # a newer one waits
        await world("supervisor", "finish")
        assert [answer.ended for answer in await asyncio.gather(again, other)] == [True, True]

    run(scenario)


def test_a_lost_group_costs_the_same_however_many_are_outstanding(
    fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feasibility is counted by deadline, of which there are max_lag + 2 at the most, not by group."""
    bench = fakes.Bench(fakes.plan(max_lag=4, batch=64, size=400, n=1))
    bench.fence(0)
    assert len(bench.reserve(320, 0).tickets) == 320
    seen: list[int] = []
    feasible = Staleness.feasible

    def counted(self: Staleness, deadlines: Any, committed: int) -> bool:
        seen.append(len(deadlines))
        return feasible(self, deadlines, committed)

    monkeypatch.setattr(Staleness, "feasible", counted)
    bench.call("forget", "gen", 1, worker="supervisor")
    assert [t.group for t in bench.reserve(320, 0, "heir").tickets] == list(range(320))  # oldest first
    assert len(seen) == 320
    assert max(seen) <= 6


def test_arriving_looks_at_the_callers_own_groups_alone(fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = fakes.Bench(fakes.plan(max_lag=4, batch=64, size=400, n=1))
    bench.fence(0)
    held = [bench.reserve(10, 0, f"g{i}").tickets for i in range(32)]

    def scan(ledger: Any) -> Any:
        raise AssertionError("a scan of all that is outstanding")

    for name in ("in_flight", "outstanding", "untaken"):
        monkeypatch.setattr(type(bench.core.ledger), name, scan)
    for i, tickets in enumerate(held):
        assert bench.submit(tickets[0], 0) == 1
        bench.score(tickets[0], 1.0)
        assert not bench.reserve(1, 0, f"g{i}", held=[t.group for t in tickets[1:]]).cancelled
    assert not bench.lease_batch(1, 0).groups  # 32 of 64
