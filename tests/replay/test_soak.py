"""A long run through the store's core: nothing in it grows with the number of groups, nor does what a restart reads."""

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from asyncrl.config import StoreSpec
from asyncrl.replay.core import StoreCore
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.rows import ROWS, Summary
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


def plan_of(fakes: SimpleNamespace, n: int = 1) -> Any:
    return fakes.plan(max_lag=1, batch=BATCH, size=2 * BATCH, n=n, evals=4)


def soak(bench: Any, groups: int, append: Callable[[int], int], look: Callable[[], int]) -> list[int]:
    """Trains so many groups, with a checkpoint and a report every few updates; what `look` says after each tenth.

    append: writes so many rows; the number of the first."""
    bench.fence(0)
    found, updates = [], groups // BATCH
    for update in range(updates):
        version = Version(1, update)
        tickets = bench.call("reserve", BATCH + 4, version, (), 0.0).tickets
        rows = [Summary(t.group, i, t.attempt, update, update, 4, version, "") for t in tickets for i in t.rollouts]
        bench.rows = append(len(rows))
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
            found.append(look())
    assert bench.core.ledger.counts().trained == updates * BATCH
    return found


def soak_on_disk(plan: Any, bench: Any, folder: Path, spec: StoreSpec, groups: int, look: Callable[[], int]) -> list[int]:
    """The same with a log in `folder`, which nobody closes; its rows are empty."""
    bench.core = StoreCore(plan, log := ReplayLog(folder, spec), bench.clock)
    most = plan.sampling.n * (BATCH + 4)
    blank = pa.RecordBatch.from_arrays([pa.nulls(most, field.type) for field in ROWS], schema=ROWS)
    return soak(bench, groups, lambda rows: log.append_rows(blank.slice(0, rows)), look)


@pytest.mark.slow
def test_nothing_grows_with_the_length_of_a_run(fakes: SimpleNamespace) -> None:
    bench = fakes.Bench(plan_of(fakes))
    bench.core.context.log.append_events = lambda events: None  # that the log grows is another matter
    sizes = soak(bench, GROUPS, lambda rows: 0, lambda: elements(bench.core))
    assert max(sizes) <= 1.05 * max(sizes[:2]), sizes  # of some thousand; a list of a number per update would show


def test_a_restart_reads_no_more_after_a_longer_run(fakes: SimpleNamespace, tmp_path: Path) -> None:
    plan, spec, numbers = plan_of(fakes), StoreSpec(segment_bytes=200_000), itertools.count()

    def events_read() -> int:
        return len(ReplayLog(shutil.copytree(tmp_path / "log", tmp_path / str(next(numbers))), spec).history)

    found = soak_on_disk(plan, bench := fakes.Bench(plan), tmp_path / "log", spec, 10_000, events_read)
    assert max(found) < 6_000, found  # of 30,000 and some
    again = StoreCore(plan, ReplayLog(tmp_path / "log", spec), bench.clock)
    for core in (bench.core, again):
        core.ledger.records.clear()  # a snapshot has some that the driver has heard of since
    assert again.ledger == bench.core.ledger


def peak_mib() -> int:
    """Of this process; `getrusage` would count what its parent had when it forked."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def restart(bench: Any, folder: Path) -> None:
    """In a process of its own: prints what a restart costs."""
    before, began = peak_mib(), time.process_time()
    log = ReplayLog(folder)
    read = len(log.history)
    bench.core = StoreCore(bench.plan, log, bench.clock)
    print(f"restart: {time.process_time() - began:.2f} s of CPU, {read} events, {peak_mib()} MiB at most ({before} before)")
    began = time.process_time()
    bench.report(0)
    print(f"all {bench.core.ledger.noted} records: {time.process_time() - began:.2f} s of CPU, {peak_mib()} MiB at most")


def main(groups: int, n: int, left: str = "") -> None:
    from tests.replay.conftest import Bench, plan

    fakes = SimpleNamespace(plan=plan)
    bench = Bench(plan_of(fakes, n))
    if left:
        restart(bench, Path(left))
        return
    began, bench.core.context.log.append_events = time.process_time(), lambda events: None  # type: ignore[method-assign]
    sizes = soak(bench, groups, lambda rows: 0, lambda: elements(bench.core))
    print(f"{groups} groups in {time.process_time() - began:.0f} s of CPU; the core holds, after each tenth: {sizes}")
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        soak_on_disk(plan_of(fakes, n), Bench(plan_of(fakes, n)), Path(folder), StoreSpec(), groups, lambda: 0)
        size = sum(path.stat().st_size for path in Path(folder).glob("events/*"))
        print(f"with a log: {time.process_time() - began:.0f} s of CPU, events of {size >> 20} MiB", flush=True)
        subprocess.run([sys.executable, "-m", "tests.replay.test_soak", str(groups), str(n), folder], check=True)


if __name__ == "__main__":  # python -m tests.replay.test_soak 1000000 1
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
