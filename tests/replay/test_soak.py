"""A long run through the store's core: nothing in it grows with the number of groups."""

import sys
import types
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.replay.log.rows import Summary
from asyncrl.types import Score, Version

BATCH, GROUPS = 250, 100_000


def elements(root: Any) -> int:
    """How many things all containers hold that are reachable from `root`: attributes, items, what closures see."""
    seen: set[int] = set()
    todo, found = [root], 0
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, str | bytes | int | float | type | types.ModuleType | types.BuiltinFunctionType):
            continue
        seen.add(id(x))
        inside: list[Any] = [getattr(x, name) for name in getattr(x, "__struct_fields__", ())]
        inside += vars(x).values() if hasattr(x, "__dict__") and not isinstance(x, types.FunctionType) else []
        inside += [x.__self__] if isinstance(x, types.MethodType) else []
        inside += [cell.cell_contents for cell in getattr(x, "__closure__", None) or ()]
        if isinstance(x, Mapping):
            inside += [*x.keys(), *x.values()]
        elif isinstance(x, Iterable) and hasattr(x, "__len__"):
            inside += list(x)
        found += len(inside)
        todo += inside
    return found


def soak(fakes: SimpleNamespace, groups: int) -> list[int]:
    """Trains so many groups, with a checkpoint and a report every few updates; the size of the core after each tenth."""
    bench = fakes.Bench(fakes.plan(max_lag=1, batch=BATCH, size=2 * BATCH, n=1, evals=4))
    bench.fence(0)
    bench.core.context.log.append_events = lambda events: None  # that the log grows is another matter
    sizes, updates = [], groups // BATCH
    for update in range(updates):
        version = Version(1, update)
        tickets = bench.call("reserve", BATCH + 4, version, (), 0.0).tickets
        rows = [Summary(t.group, i, t.attempt, update, update, 4, version, "") for t in tickets for i in t.rollouts]
        assert bench.take(rows) == len(rows)
        lease, _ = bench.lease_unscored(len(rows), "r", 1)
        scores = [Score(group=s.group, rollout=s.rollout, attempt=s.attempt, status="ok", reward=1.0) for s in rows]
        bench.call("score", lease, scores, worker="r")
        assert bench.train(update)
        if update % 20 == 5:
            bench.request_eval(Version(1, update + 1))
        if update % 10 == 9:
            bench.checkpointed(update + 1)
            bench.report(bench.report(bench.core.ledger.noted - 3).records[-1].sequence)
        if (update + 1) % (updates // 10) == 0:
            sizes.append(elements(bench.core))
    assert bench.core.ledger.counts().trained == updates * BATCH
    return sizes


@pytest.mark.slow
def test_nothing_grows_with_the_length_of_a_run(fakes: SimpleNamespace) -> None:
    sizes = soak(fakes, GROUPS)
    assert max(sizes) <= 1.05 * max(sizes[:2]), sizes  # of some thousand; a list of a number per update would show


if __name__ == "__main__":
    import time

    from tests.replay.conftest import Bench, plan  # python -m tests.replay.test_soak 1000000

    began = time.process_time()
    found = soak(SimpleNamespace(Bench=Bench, plan=plan), int(sys.argv[1]))
    print(f"{sys.argv[1]} groups in {time.process_time() - began:.0f} s of CPU; the core holds, after each tenth: {found}")
