"""What a crowd costs the replay store: calls that wait in it, groups whose holders died, stragglers; its CPU per short sample.

    python tests/bench/bench_waits.py [--waiting 1024] [--updates 60]

Seconds of CPU, of the store and its event loop; rollouts of 4 tokens, groups of 8. The calls of the last figure are those of
the arithmetic recipe: 32 groups an update, a call for each submitted group and for every 8 scores.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from asyncrl.config import SamplingSpec
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log import rows as schema
from asyncrl.replay.plan import Source, StorePlan
from asyncrl.replay.store import ReplayStore
from asyncrl.staleness import Staleness
from asyncrl.types import Key, Prompt, Rollout, Sampling, Score, Span, Ticket, Version


def rollouts(ticket: Ticket, version: Version) -> list[Rollout]:
    return [
        Rollout(
            group=ticket.group,
            rollout=i,
            attempt=ticket.attempt,
            prompt=ticket.prompt,
            response_ids=[7, 5, 0, 1],
            logprobs=[-0.5] * 4,
            kept_logmass=None,
            loss_mask=[1] * 4,
            turns=(0,),
            spans=(Span(version, 4),),
            finish_reason="stop",
            worker="generator-0",
            times={"started": 1.0},
            text="570",
        )
        for i in ticket.rollouts
    ]


def make_store(folder: Path, batch: int, ahead: int, max_lag: int = 4) -> ReplayStore:
    prompts = [Prompt(row=i, ids=tuple(range(7)), data_source="add", ground_truth='"570"') for i in range(8192)]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(0,))
    plan = StorePlan(
        rule=Staleness(max_lag=max_lag, batch_groups=batch, reserve_ahead=ahead),
        source=Source(prompts=prompts, sampling=sampling),
        sampling=SamplingSpec(n=8, min_valid=1, max_attempts=1),
    )
    return ReplayStore(plan, folder)


async def crowd(folder: Path, waiting: int) -> None:
    store, sequence, version = make_store(folder, 512, 5), 0, Version(1, 0)

    def call(worker: str, verb: str, *args: Any) -> Any:
        nonlocal sequence
        sequence += 1
        return store.call(verb, Key(worker, 1, sequence), *args)

    await call("learner", "fence", 0)
    tickets = (await call("gen", "reserve", 2560, version, (), 1.0)).tickets
    waits = [asyncio.ensure_future(call(f"w{i}", "reserve", 1, version, (), 60.0)) for i in range(waiting)]
    await asyncio.sleep(0.5)
    spent = []
    for ticket in tickets[:20]:
        rows = schema.encode_rollouts(rollouts(ticket, version), "bench")
        began = time.process_time()
        await call("gen", "submit", rows)
        await asyncio.sleep(0.01)  # until all that it woke has run
        spent.append(time.process_time() - began)
    print(f"one submit while {waiting} generators wait: {1e3 * statistics.median(spent):.2f} ms")
    began = time.process_time()
    await call("supervisor", "forget", "gen", 1)
    got = sum(len(reserved.tickets) for reserved in await asyncio.gather(*waits))
    print(f"{got} lost groups to as many who wait: {1e3 * (time.process_time() - began):.0f} ms")
    for i in range(waiting):
        await call("supervisor", "forget", f"w{i}", 1)
    began = time.process_time()
    got = len((await call("heir", "reserve", 4000, version, (), 1.0)).tickets)
    print(f"{got} lost groups to one: {1e3 * (time.process_time() - began):.0f} ms")
    await store.close()


async def held_back(folder: Path, batch: int) -> None:
    store, calls = make_store(folder, batch, 2, max_lag=1), 0

    def call(worker: str, verb: str, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return store.call(verb, Key(worker, 1, calls, 1), *args)

    async def ready(worker: str, update: int) -> None:
        version = Version(1, update)
        for ticket in (await call(worker, "reserve", batch, version, (), 0.0)).tickets:
            await call(worker, "submit", schema.encode_rollouts(rollouts(ticket, version), "bench"))
            scores = [Score(group=ticket.group, rollout=i, attempt=0, status="ok", reward=1.0) for i in ticket.rollouts]
            await call("reward", "score", 0, scores)

    await call("learner", "fence", 0)
    await call("slow", "reserve", batch, Version(1, 0), (), 0.0)
    await ready("fast", 0)
    lease = await call("learner", "lease_batch", 0, 0.0)
    await call("learner", "commit", lease.lease, Version(1, 1), {})
    await ready("next", 1)
    began = time.process_time()
    for _ in range(50):
        assert (await call("learner", "lease_batch", 1, 0.0)).waiting_for == "stragglers"
    spent = (time.process_time() - began) / 50
    print(f"a batch of {batch} ready groups that stragglers hold back, asked for again: {1e6 * spent:.0f} µs")
    await store.close()


def short(folder: Path, updates: int) -> None:
    store, loop = make_store(folder, 32, 3), asyncio.new_event_loop()
    spent: Counter[str] = Counter()

    def call(verb: str, key: Key, *args: Any, timeout_s: float) -> Any:
        began = time.process_time()
        try:
            return loop.run_until_complete(store.call(verb, key, *args))
        finally:
            spent[verb] += time.process_time() - began  # type: ignore[assignment]

    generator, reward, learner = (ReplayClient(call, name, 1) for name in ("generator", "reward", "learner"))
    learner.fence(0)
    spent.clear()
    samples = 0
    for update in range(updates):
        version = Version(1, update)
        while not (batch := learner.lease_batch(update, 0.0)).groups:
            for ticket in generator.reserve(8, version, [], 0.0).tickets:
                generator.submit(rollouts(ticket, version))
                samples += 8
            while items := (lease := reward.lease_unscored(64, 0.0)).items:
                scores = [Score(group=x.group, rollout=x.rollout, attempt=x.attempt, status="ok", reward=1.0) for x in items]
                for first in range(0, len(scores), 8):
                    reward.score(lease.lease, scores[first : first + 8])
        learner.rows(batch.groups)
        learner.commit(batch.lease, Version(1, update + 1), {"loss": 0.0})
    verbs = ", ".join(f"{verb} {1e6 * seconds / samples:.0f}" for verb, seconds in spent.most_common())
    print(f"CPU per sample: {1e6 * sum(spent.values()) / samples:.0f} µs ({verbs})")
    loop.run_until_complete(store.close())
    loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(crowd(Path(folder) / "crowd", options.waiting))
        for batch in (256, 2048):
            asyncio.run(held_back(Path(folder) / f"held-{batch}", batch))
        short(Path(folder) / "short", options.updates)


if __name__ == "__main__":
    main()
