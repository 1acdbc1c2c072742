"""The actor shell on one event loop: who waits, who wakes, what a restart and a broken disk look like."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.errors import Closed, DataError, DiskFull, Fenced, Unavailable
from asyncrl.replay.log import rows as schema
from asyncrl.replay.store import ReplayStore
from asyncrl.types import Key, Version

V = Version(1, 0)


class Caller:
    """Calls a store under growing sequence numbers. learner: the incarnation that `fence` gives."""

    def __init__(self, store: ReplayStore, worker: str = "gen", incarnation: int = 1, learner: int = 0) -> None:
        self.store, self.worker, self.incarnation, self.learner, self.sequence = store, worker, incarnation, learner, 0

    def key(self) -> Key:
        self.sequence += 1
        return Key(self.worker, self.incarnation, self.sequence, self.learner)

    def __call__(self, method: str, *args: Any) -> Awaitable[Any]:
        return self.store.call(method, self.key(), *args)


def ask(store: ReplayStore, verb: str, *args: Any) -> Awaitable[Any]:
    """As the supervisor."""
    return store.call(verb, Key("supervisor", 0, 0), *args)


def killed(store: ReplayStore) -> None:
    """As far as its log is concerned."""
    store._folder.close()


def make(fakes: SimpleNamespace, folder: Path, **options: Any) -> ReplayStore:
    return ReplayStore(fakes.plan(**options), folder)


def rows(fakes: SimpleNamespace, *tickets: Any) -> bytes:
    return schema.encode_rollouts([fakes.rollout(t, i, V) for t in tickets for i in t.rollouts], "run")


async def waiting(store: ReplayStore, count: int = 1) -> None:
    """Until so many calls wait for the store's next change."""
    while len(store._waiters.get("all", ())) < count:
        await asyncio.sleep(0)


def test_long_polls_wake_on_change(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, n=1)
        generator, reward, learner = Caller(store), Caller(store, "reward"), Caller(store, "learner", learner=1)
        await learner("fence", 0)
        batch = asyncio.ensure_future(learner("lease_batch", 0, 60.0))
        unscored = asyncio.ensure_future(reward("lease_unscored", 8, 60.0))
        (ticket,) = (await generator("reserve", 4, V, (), 60.0)).tickets
        full = asyncio.ensure_future(generator("reserve", 4, V, (ticket.group,), 10.0))
        await waiting(store, 3)
        await generator("submit", rows(fakes, ticket))
        lease = await unscored
        await reward("score", lease.lease, [fakes.score(ticket, 0, 1.0)])
        leased = await batch
        assert leased.groups == (ticket.group,)
        got = await learner("rows", leased.groups)
        (r,) = schema.decode_train(schema.from_ipc(got.rows), got.scores)
        assert (r.reward, r.response_ids.tolist()) == (1.0, [5, 5, 0])
        await learner("commit", leased.lease, Version(1, 1), {"loss": 1.0})  # answered while `full` waits
        assert not full.done()
        newer = await Caller(store, "other")("reserve", 4, Version(1, 1), (), 60.0)
        assert len(newer.tickets) == 1
        full.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_poll_ends_at_its_deadline_and_says_why(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1)
        a, b = Caller(store, "a"), Caller(store, "b")
        held = [t.group for t in (await a("reserve", 9, V, (), 1.0)).tickets]
        started = time.monotonic()
        answers = await asyncio.gather(
            b("reserve", 9, V, (), 0.05),
            a("reserve", 0, V, held, 0.05),
            b("lease_unscored", 1, 0.05),
            Caller(store, "learner")("lease_batch", 0, 0.05),
        )
        assert 0.04 < time.monotonic() - started < 8
        assert answers[0].waiting_for == "bound full"
        assert answers[1].cancelled == ()
        assert answers[2].rows == b""
        assert answers[3].waiting_for == "ready groups" or answers[3].waiting_for == "the oldest groups"
        assert not store._waiters  # polls that end while nothing changes leave nothing behind

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_lease_that_runs_out_wakes_those_who_wait(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, lease_s=0.2)
        (ticket,) = (await Caller(store, "dies")("reserve", 1, V, (), 1.0)).tickets
        heir = Caller(store, "heir")
        for _ in range(50):  # one poll lasts half a lease at most
            if tickets := (await heir("reserve", 1, V, (), 60.0)).tickets:
                break
        assert (tickets[0].group, tickets[0].attempt) == (ticket.group, 1)
        await heir("submit", rows(fakes, tickets[0]))
        assert (await Caller(store, "r1")("lease_unscored", 8, 1.0)).rows
        again = await Caller(store, "r2")("lease_unscored", 8, 60.0)
        assert schema.from_ipc(again.rows).num_rows == 2

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_store_that_was_stopped_hands_nobodys_work_out(fakes: SimpleNamespace, tmp_path: Path) -> None:
    """Longer than a lease: a slow disk, a stopped process. Who calls first afterwards must not get everybody's work."""

    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, lease_s=0.5)
        (mine,) = (await Caller(store, "slow")("reserve", 1, V, (), 1.0)).tickets
        waits = asyncio.ensure_future(Caller(store, "quick")("reserve", 1, V, (), 60.0))
        await waiting(store)
        time.sleep(1.5)
        assert (await waits).tickets == ()
        assert (await Caller(store, "slow")("reserve", 0, V, (mine.group,), 0.0)).cancelled == ()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_repeated_key_gets_the_first_answer(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=1, batch=2)
        key = Key("gen", 1, 5)
        first = await store.call("reserve", key, 2, V, (), 1.0)
        assert await store.call("reserve", key, 2, V, (), 1.0) == first
        assert await store.call("reserve", Key("gen", 1, 4), 2, V, (), 1.0) is None  # overtaken: takes nothing
        assert not any(group["lost"] for group in (await ask(store, "state"))["in_flight"])  # an old `held` loses nothing
        fence = Key("learner", 1, 1)
        assert await store.call("fence", fence, 0) == await store.call("fence", fence, 0)
        for _ in range(2):
            await store.call("submit", Key("gen", 1, 6), rows(fakes, first.tickets[0]))
        assert (await ask(store, "report", 0)).gauges["store/unscored"] == 2

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_an_abandoned_poll_takes_nothing(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, n=1)
        (ticket,) = (await Caller(store)("reserve", 1, V, (), 1.0)).tickets
        reward = Caller(store, "reward")
        abandoned = asyncio.ensure_future(reward("lease_unscored", 8, 60.0))
        await waiting(store)
        retry = asyncio.ensure_future(reward("lease_unscored", 8, 60.0))
        assert await abandoned is None  # at once
        await waiting(store)
        await Caller(store, "sender")("submit", rows(fakes, ticket))
        assert (await retry).rows

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_lease_whose_answer_reached_nobody_goes_to_the_next_incarnation(fakes: SimpleNamespace, tmp_path: Path) -> None:
    """A reward worker that is killed while it waits: its call goes on in the store, and takes what comes."""

    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, n=1)
        (ticket,) = (await Caller(store)("reserve", 1, V, (), 1.0)).tickets
        killed = asyncio.ensure_future(Caller(store, "reward")("lease_unscored", 8, 60.0))
        await waiting(store)
        await Caller(store, "sender")("submit", rows(fakes, ticket))
        assert (await killed).rows
        assert (await Caller(store, "reward", incarnation=2)("lease_unscored", 8, 0.0)).rows

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_the_work_of_a_worker_known_to_be_dead_is_handed_to_others_at_once(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1)
        (ticket,) = (await Caller(store, "g0")("reserve", 1, V, (), 1.0)).tickets
        heir = Caller(store, "g1")
        waits = asyncio.ensure_future(heir("reserve", 1, V, (), 60.0))
        await waiting(store)
        await ask(store, "forget", "g0", 1)
        (again,) = (await waits).tickets
        assert (again.group, again.attempt) == (ticket.group, 1)
        with pytest.raises(Fenced):
            await Caller(store, "g0")("reserve", 1, V, (), 1.0)
        await Caller(store, "g0", incarnation=2)("reserve", 0, V, (), 0.0)  # its successor is welcome

        await heir("submit", rows(fakes, again))
        assert (await Caller(store, "r0")("lease_unscored", 8, 1.0)).rows
        waits = asyncio.ensure_future(Caller(store, "r1")("lease_unscored", 8, 60.0))
        await waiting(store)
        await ask(store, "forget", "r0", 0)  # an earlier one: nothing of its successor's is touched
        assert not waits.done()
        await ask(store, "forget", "r0", 1)
        assert schema.from_ipc((await waits).rows).num_rows == 2

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_an_older_incarnation_is_fenced(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path)
        await Caller(store, incarnation=2)("reserve", 1, V, (), 1.0)
        with pytest.raises(Fenced, match="gen incarnation 1 < 2"):
            await Caller(store, incarnation=1)("reserve", 1, V, (), 1.0)
        killed(store)
        again = make(fakes, tmp_path)  # the log remembers
        with pytest.raises(Fenced):
            await Caller(again, incarnation=1)("extend", 1)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_killed_store_goes_on_from_its_log(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=1, batch=2, n=1)
        generator, reward, learner = Caller(store), Caller(store, "reward"), Caller(store, "learner", learner=1)
        await learner("fence", 0)
        a, b, c = (await generator("reserve", 3, V, (), 1.0)).tickets
        await generator("submit", rows(fakes, a, b))
        await reward("score", 0, [fakes.score(a, 0, 1.0)])
        before = await ask(store, "report", 0)
        killed(store)
        generator.store = reward.store = learner.store = make(fakes, tmp_path, max_lag=1, batch=2, n=1)
        assert (await ask(generator.store, "report", 0)).counts == before.counts
        held = await generator("reserve", 0, V, (c.group,), 0.0)
        assert held.cancelled == ()
        lease = await reward("lease_unscored", 8, 1.0)
        assert [u.group for u in schema.decode_unscored(schema.from_ipc(lease.rows))] == [b.group]
        await reward("score", lease.lease, [fakes.score(b, 0, 0.0)])
        leased = await learner("lease_batch", 0, 1.0)
        assert schema.from_ipc((await learner("rows", leased.groups)).rows).num_rows == 2
        for _ in range(2):
            await learner("commit", leased.lease, Version(1, 1), {})
        await learner("checkpointed", 1)
        report = await ask(generator.store, "report", 0)
        assert (report.counts.trained, len(report.records), report.committed) == (2, 1, 1)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_the_end_reaches_everybody(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, size=1, epochs=1)
        learner = Caller(store, "learner", learner=1)
        await learner("fence", 0)
        await Caller(store, "a")("reserve", 1, V, (), 1.0)
        waits = [
            asyncio.ensure_future(call)
            for call in (
                Caller(store, "b")("reserve", 1, V, (), 60.0),
                Caller(store, "r")("lease_unscored", 1, 60.0),
                learner("lease_batch", 0, 60.0),
            )
        ]
        await waiting(store, 3)
        await ask(store, "finish")
        assert [answer.ended for answer in await asyncio.gather(*waits)] == [True] * 3
        assert (await ask(store, "state"))["ended"]
        await store.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_after_a_restart_the_end_is_told_by_finish_or_undone_by_a_resume(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1)
        learner = Caller(store, "learner", learner=1)
        await learner("fence", 0)
        await ask(store, "finish")
        killed(store)
        learner.store = resumed = make(fakes, tmp_path, max_lag=0, batch=1)
        early = asyncio.ensure_future(Caller(resumed, "gen")("reserve", 1, Version(2, 0), (), 60.0))
        reward = asyncio.ensure_future(Caller(resumed, "reward")("lease_unscored", 1, 60.0))
        await waiting(resumed, 2)  # neither is sent away
        await learner("fence", 0)
        assert len((await early).tickets) == 1
        await ask(resumed, "finish")
        assert (await reward).ended

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_callers_on_several_event_loops_wake_each_other(fakes: SimpleNamespace, tmp_path: Path) -> None:
    """Ray runs each concurrency group of an actor on a loop and thread of its own."""
    store = make(fakes, tmp_path, max_lag=4, batch=2, n=1, size=40, epochs=1, on_stale="hold")
    learner, failures = Caller(store, "learner", learner=1), []
    asyncio.run(learner("fence", 0))  # type: ignore[arg-type]

    async def generate(name: str) -> None:
        caller, update = Caller(store, name), 0
        while not (answer := await caller("reserve", 2, Version(1, update), (), 0.05)).ended:
            if answer.tickets:
                made = [fakes.rollout(t, 0, Version(1, update)) for t in answer.tickets]
                await caller("submit", schema.encode_rollouts(made, "run"))
            update = store._core.ledger.committed

    async def reward() -> None:
        caller = Caller(store, "reward")
        while not (lease := await caller("lease_unscored", 3, 5.0)).ended:
            if lease.rows:
                items = schema.decode_unscored(schema.from_ipc(lease.rows))
                await caller("score", lease.lease, [fakes.score(u, u.rollout, 1.0) for u in items])

    async def learn() -> None:
        update = 0
        while not (lease := await learner("lease_batch", update, 5.0)).ended:
            if lease.groups:
                await learner("commit", lease.lease, Version(1, update + 1), {})
                update += 1
        await ask(store, "finish")

    def thread(actor: Any) -> None:
        try:
            asyncio.run(asyncio.wait_for(actor, 20))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=thread, args=(a,)) for a in (generate("a"), generate("b"), reward(), learn())]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert failures == []
    assert store._core.ledger.counts().trained == 40


def test_after_a_failed_write_every_call_says_so(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path)

        def broken(events: Any) -> None:
            raise OSError(5, "Input/output error")

        store._core.context.log.append_events = broken
        for _ in range(2):
            with pytest.raises(Unavailable, match="Input/output error"):
                await Caller(store)("reserve", 1, V, (), 1.0)
        killed(store)
        assert (await ask(make(fakes, tmp_path), "report", 0)).counts.reserved == 0  # nothing unacknowledged came back

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_full_disk_is_told_to_everybody_as_what_no_restart_mends_and_nothing_durable_is_lost(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path)
        generator, (ticket, _) = Caller(store), (await Caller(store)("reserve", 2, V, (), 1.0)).tickets
        write, left = os.write, 300  # bytes: it fills in the middle of a record

        def until_full(descriptor: int, data: memoryview) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = write(descriptor, data[:left])
            left -= written
            return written

        monkeypatch.setattr(os, "write", until_full)
        generator.sequence = 1
        told = rf"no room for {tmp_path} \(No space left on device\): 64\.0 MiB are needed, .* are free"
        with pytest.raises(DiskFull, match=told):
            await generator("submit", rows(fakes, ticket))
        for call in (generator("reserve", 1, V, (), 1.0), ask(store, "report", 0)):
            with pytest.raises(DiskFull, match=told):
                await call
        with pytest.raises(OSError, match="No space left"):
            await store.close()
        with pytest.raises(Closed):
            await generator("reserve", 1, V, (), 1.0)
        with pytest.raises(DiskFull, match=told):  # a restarted one would meet the same
            make(fakes, tmp_path)
        monkeypatch.undo()
        again = make(fakes, tmp_path)
        assert (await ask(again, "report", 0)).counts.reserved == 2
        await Caller(again)("submit", rows(fakes, ticket))

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_room_that_is_there_again_when_the_store_closes_makes_no_damage_of_a_torn_record(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the save that filled the disk was given up: what was synced last is marked, right behind what was whole."""

    async def scenario() -> None:
        store, write = make(fakes, tmp_path), os.write
        generator, (ticket, _) = Caller(store), (await Caller(store)("reserve", 2, V, (), 1.0)).tickets
        generator.sequence = 1
        torn = iter([lambda fd, data: write(fd, data[:100])])

        def full(descriptor: int, data: memoryview) -> int:
            for once in torn:
                return once(descriptor, data)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DiskFull):
            await generator("submit", rows(fakes, ticket))
        monkeypatch.undo()
        await store.close()
        again = make(fakes, tmp_path)
        assert (await ask(again, "report", 0)).counts.reserved == 2
        await Caller(again)("submit", rows(fakes, ticket))

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_rows_of_another_schema_are_refused_and_do_no_harm(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path)
        (ticket, *_) = (await Caller(store)("reserve", 1, V, (), 1.0)).tickets
        foreign = schema.to_ipc(schema.from_ipc(rows(fakes, ticket)).select(["group"]))
        with pytest.raises(DataError):
            await Caller(store)("submit", foreign)
        await Caller(store)("submit", rows(fakes, ticket))

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_too_old_weights_are_told_at_once(fakes: SimpleNamespace, tmp_path: Path) -> None:
    """The caller has to swap, and can't while it waits."""

    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, n=1)
        generator, reward, learner = Caller(store), Caller(store, "reward"), Caller(store, "learner", learner=1)
        await learner("fence", 0)
        (ticket,) = (await generator("reserve", 1, V, (), 60.0)).tickets
        await generator("submit", rows(fakes, ticket))
        await reward("score", 0, [fakes.score(ticket, 0, 1.0)])
        lease = await learner("lease_batch", 0, 60.0)
        full = asyncio.ensure_future(generator("reserve", 1, V, (), 60.0))
        await waiting(store)
        await learner("commit", lease.lease, Version(1, 1), {})
        assert (await full).waiting_for == "weights too old"  # long before its deadline

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_call_after_the_close_is_refused_and_harms_nothing(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path)
        await Caller(store)("reserve", 1, V, (), 1.0)
        poll = asyncio.ensure_future(Caller(store, "reward")("lease_unscored", 1, 60.0))
        await waiting(store)
        for _ in range(2):
            await store.close()
        with pytest.raises(Closed):
            await poll
        with pytest.raises(Closed):
            await Caller(store, "late")("reserve", 1, V, (), 1.0)
        assert (await ask(make(fakes, tmp_path), "report", 0)).counts.reserved == 1

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_learner_that_another_one_replaced_gets_no_batch_and_no_rows(fakes: SimpleNamespace, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make(fakes, tmp_path, max_lag=0, batch=1, n=1)
        generator, zombie, learner = Caller(store), Caller(store, "zombie", learner=1), Caller(store, "learner", learner=2)
        await zombie("fence", 0)
        (ticket,) = (await generator("reserve", 1, V, (), 1.0)).tickets
        await generator("submit", rows(fakes, ticket))
        await Caller(store, "reward")("score", 0, [fakes.score(ticket, 0, 1.0)])
        await learner("fence", 0)
        groups = (await learner("lease_batch", 0, 1.0)).groups
        for call in (zombie("lease_batch", 0, 1.0), zombie("rows", groups), zombie("commit", 1, Version(1, 1), {})):
            with pytest.raises(Fenced, match="learner incarnation 1 is not the newest"):
                await call
        assert len((await learner("rows", groups)).scores) == 1

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_generator_never_waits_until_its_own_lease_is_over(fakes: SimpleNamespace) -> None:
    core = fakes.Bench(fakes.plan(lease_s=30.0)).core
    assert core.verbs["reserve"](Key("gen", 1, 1), 0, V, (), 60.0).wait_s == 15.0
    assert core.verbs["reserve"](Key("gen", 1, 2), 0, V, (), 1.0).wait_s == 1.0
