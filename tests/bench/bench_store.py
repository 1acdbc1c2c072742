"""Replay store throughput: rows and tokens per second in and out, through client, core and log, over a direct transport.

    python tests/bench/bench_store.py [--groups 512] [--n 8] [--tokens 256] [--folder DIR]

Seconds of CPU. The ratio is to the plain work: encoding the same rows to Arrow IPC and writing the bytes to a file.
"""

import argparse
import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncrl.config import SamplingSpec
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.log import rows as schema
from asyncrl.replay.plan import Source, StorePlan
from asyncrl.replay.store import ReplayStore
from asyncrl.staleness import Staleness
from asyncrl.types import Key, Prompt, Rollout, RolloutPiece, Sampling, Score, Span, Ticket, Version

V = Version(1, 0)


def rollout(ticket: Ticket, index: int, tokens: int) -> Rollout:
    return Rollout(
        group=ticket.group,
        rollout=index,
        attempt=ticket.attempt,
        prompt=ticket.prompt,
        response_ids=list(range(tokens)),
        logprobs=[-0.5] * tokens,
        kept_logmass=None,
        loss_mask=[1] * tokens,
        turns=(0,),
        spans=(Span(V, tokens),),
        finish_reason="stop",
        worker="generator-0",
        times={"reserved": 1.0, "started": 2.0, "finished": 3.0},
        text=text(ticket.seeds[index], tokens),
        prompt_text=text(ticket.group, 64),
    )


def piece(r: Rollout) -> RolloutPiece:
    """All of it, as it is handed over while it is unfinished."""
    of = {"group": r.group, "rollout": r.rollout, "attempt": r.attempt, "start": 0}
    return RolloutPiece(**of, token_ids=r.response_ids, logprobs=r.logprobs, kept_logmass=None, spans=r.spans)


def text(seed: int, tokens: int) -> str:
    """Five letters a token, as hard to compress as hexadecimal digits."""
    return random.Random(seed).randbytes(5 * tokens // 2).hex()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def make_plan(groups: int, n: int, tokens: int) -> StorePlan:
    """Eight batches may be outstanding together."""
    prompts = [Prompt(row=i, ids=tuple(range(64)), data_source="bench") for i in range(groups)]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=tokens, stop_token_ids=(0,))
    return StorePlan(
        rule=Staleness(max_lag=7, batch_groups=groups // 8),
        source=Source(prompts=prompts, sampling=sampling),
        sampling=SamplingSpec(n=n, min_valid=1, max_attempts=1),
    )


def bench(groups: int, n: int, tokens: int, folder: Path) -> dict[str, float]:
    """Seconds per stage, for groups × n rollouts of `tokens` tokens; submitted one group a call."""
    plan = make_plan(groups, n, tokens)
    store = ReplayStore(plan, folder)
    loop = asyncio.new_event_loop()

    def call(verb: str, key: Key, *args: Any, timeout_s: float) -> Any:
        return loop.run_until_complete(store.call(verb, key, *args))

    client = ReplayClient(call, "bench", 1)
    client.fence(0)
    seconds: dict[str, float] = {}
    seconds["reserve"], answer = timed(lambda: client.reserve(groups, V, [], 1.0))
    made = [[rollout(t, i, tokens) for i in t.rollouts] for t in answer.tickets]

    def plain() -> None:
        with (folder / "plain.arrow").open("wb", buffering=0) as file:
            for group in made:
                file.write(schema.encode_rollouts(group, "bench"))

    def stream() -> None:
        for group in made:
            client.stream([piece(r) for r in group])

    def submit() -> None:
        for group in made:
            client.submit(group)

    def lease() -> list[Any]:
        leases = []
        while (got := client.lease_unscored(64, 0.0)).items:
            leases.append(got)
        return leases

    def score(leases: list[Any]) -> None:
        for got in leases:
            verdicts = [Score(group=u.group, rollout=u.rollout, attempt=u.attempt, status="ok", reward=1.0) for u in got.items]
            client.score(got.lease, verdicts)

    def train() -> None:
        for update in range(8):
            got = client.lease_batch(update, 0.0)
            assert len(client.rows(got.groups)) == groups // 8 * n
            client.commit(got.lease, Version(1, update + 1), {"loss": 0.0})

    seconds["plain encode + write"] = min(timed(plain)[0] for _ in range(2))
    seconds["stream"], _ = timed(stream)
    seconds["submit"], _ = timed(submit)
    seconds["lease unscored"], leases = timed(lease)
    seconds["score"], _ = timed(lambda: score(leases))
    seconds["lease, rows, commit"], _ = timed(train)
    shutil.copytree(folder, folder / "killed")
    seconds["close"], _ = timed(lambda: loop.run_until_complete(store.close()))
    loop.close()
    seconds["rebuild"], _ = timed(lambda: ReplayStore(plan, folder))
    seconds["rebuild after a kill"], _ = timed(lambda: ReplayStore(plan, folder / "killed"))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds = bench(options.groups, options.n, options.tokens, Path(folder))
    rows = options.groups * options.n
    print(f"{rows} rollouts × {options.tokens} tokens, {options.n} a call")
    print(f"{'stage':24}{'seconds':>9}{'rows/s':>11}{'Mtokens/s':>11}{'× plain':>9}")
    for stage, spent in seconds.items():
        rate, ratio = rows / spent, spent / seconds["plain encode + write"]
        print(f"{stage:24}{spent:9.3f}{rate:11.0f}{rate * options.tokens / 1e6:11.2f}{ratio:9.2f}")


if __name__ == "__main__":
    main()
