"""Power failures and damaged disks: what was synced is there, what is wrong is never read, and a learner can always resume."""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from asyncrl.config import StoreSpec
from asyncrl.errors import DataError
from asyncrl.replay.core import StoreCore
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.log import events as ev
from asyncrl.replay.log import rows as schema
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.replay.log.tail import MARK
from asyncrl.types import Rollout, Score, Ticket, Version


class PowerFailure(BaseException):
    """Nothing may catch it, as nothing runs on after one."""


class Disk:
    """Knows what of a folder was synced: names, and the bytes of files. Its power fails in the call of fsync after `left`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.held = folder, folder.with_name(f"{folder.name}.held")
        self.held.mkdir()  # a link to every file that had a name on the disk, also after it was deleted
        self.names = self._present()
        self.bytes = {inode: (folder / name).read_bytes() for name, inode in self.names.items()}
        self._hold()
        self.left = 10**9
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if self.left == 0:
            raise PowerFailure
        self.left -= 1
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_dir():
            self.bytes[path.stat().st_ino] = path.read_bytes()
            return
        elsewhere = {name: inode for name, inode in self.names.items() if (self.folder / name).parent != path}
        self.names = elsewhere | {name: inode for name, inode in self._present().items() if (self.folder / name).parent == path}
        self._hold()

    def after_failure(self, rng: random.Random, folder: Path) -> None:
        """Writes what the next start may find into `folder`."""
        present = self._present()
        for name in self.names.keys() | present.keys():
            inode = self.names.get(name) if rng.random() < 0.5 else present.get(name)
            if inode is not None:
                held = self.held / str(inode)
                data = (held if held.exists() else self.folder / name).read_bytes()
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(torn(rng, data, len(self.bytes.get(inode, b""))))

    def _hold(self) -> None:
        for name, inode in self.names.items():
            if not (self.held / str(inode)).exists():
                os.link(self.folder / name, self.held / str(inode))

    def _present(self) -> dict[str, int]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.stat().st_ino for path in files}


def torn(rng: random.Random, data: bytes, synced: int) -> bytes:
    """What a power failure leaves of a file: all that was synced; of the rest some, some as zeros, some out of order."""
    begin, end = sorted((rng.randint(synced, len(data)), rng.randint(synced, len(data))))
    zeros = data[:begin] + bytes(end - begin)
    return rng.choice([data, data[:begin], zeros, zeros + data[end:]])


class Run:
    """Generators, rewards and a learner on a store whose log is on a `Disk`. checkpoints: those on the disk, which are synced
    when they are written; `counts` is the newest that the store was told of. All events, and how many of them were synced."""

    def __init__(self, fakes: SimpleNamespace, spec: StoreSpec) -> None:
        self.fakes, self.spec = fakes, spec
        self.checkpoints: list[Version] = []
        self.counts = Version(0, 0)
        self.events: list[ev.Event] = []
        self.synced = 0
        self.snapshots = 0  # openings that began with one

    def open(self, folder: Path) -> None:
        """Restarts the store, and the learner from the newest checkpoint that the log reaches."""
        log = ReplayLog(folder, self.spec)
        found = state(log.find(*ev.Event.__subclasses__()))
        self.snapshots += bool(log.state)
        assert found == self.events[: len(found)]
        assert len(found) >= self.synced, "something that was synced is lost"
        self.events, self.synced = found, len(found)
        append, sync = log.append_events, log.sync

        def note(events: list[ev.Event]) -> None:
            self.events += events
            append(events)

        def note_sync() -> None:
            sync()
            self.synced = len(self.events)

        log.append_events, log.sync = note, note_sync  # type: ignore[method-assign]
        self.bench = self.fakes.Bench(self.fakes.plan(max_lag=4, batch=1, size=50))
        self.core = self.bench.core = StoreCore(self.bench.plan, log, self.bench.clock)
        assert self.core.ledger == accounting(found)
        self.start()

    def close(self) -> None:
        for stream in (self.core.context.log._rows, self.core.context.log._events):
            stream.release()

    def start(self) -> None:
        history = self.bench.call("lineage")
        usable = [version for version in self.checkpoints if not history.refusal(version)]
        assert bool(usable) == bool(self.checkpoints), "no checkpoint is left to resume from"
        at = usable[-1].update if usable else 0
        assert at >= self.counts.update, "a checkpoint that counted can't be resumed from"
        self.bench.fence(at)
        self.checkpoints = [version for version in self.checkpoints if version.update <= at]
        self.retain() if self.checkpoints else self.save()

    def save(self) -> None:
        version = Version(self.core.ledger.incarnation, self.core.ledger.committed)
        self.checkpoints = [*(v for v in self.checkpoints if v.update < version.update), version]
        self.retain()

    def retain(self) -> None:
        self.bench.checkpointed(self.checkpoints[-2:][0].update)
        self.counts = self.checkpoints[-1]
        self.checkpoints = self.checkpoints[-2:]

    def update(self) -> None:
        """Generates, scores and trains one batch, whose rows must be those that were generated."""
        ledger, call = self.core.ledger, self.bench.call
        version = Version(ledger.incarnation, ledger.committed)
        for ticket in call("reserve", 2, version, [], 0.0).tickets:
            rows = [self.rollout(ticket, i, version) for i in ticket.rollouts]
            call("submit", schema.encode_rollouts(rows, "run"))
        while (lease := call("lease_unscored", 8, 0.0)).rows:
            scores = [Score(group=u.group, rollout=u.rollout, attempt=u.attempt, status="ok", reward=1.0)
                      for u in lease.decode().items]  # fmt: skip
            call("score", lease.lease, scores)
        batch = call("lease_batch", version.update, 0.0, learner=version.incarnation)
        assert batch.groups, batch
        for row in call("rows", batch.groups, learner=version.incarnation).decode():
            assert row.response_ids.tolist() == response(row.group, row.rollout)
        call("commit", batch.lease, Version(version.incarnation, version.update + 1), {})

    def rollout(self, ticket: Ticket, index: int, version: Version) -> Rollout:
        ids = response(ticket.group, index)
        return self.fakes.rollout(ticket, index, version, len(ids), response_ids=ids)


def response(group: int, rollout: int) -> list[int]:
    return [1000 * group + rollout] * (3 + group % 5)


def accounting(events: Iterable[ev.Event]) -> Ledger:
    """What they come to."""
    ledger = Ledger(max_lag=4)
    for event in events:
        ledger.apply(event)
    return ledger


def state(events: Iterable[Any]) -> list[Any]:
    return [e for e in events if not isinstance(e, ev.SegmentClosed | ev.SegmentDropped)]


SPECS = {  # and how many seeds
    "one tail": (StoreSpec(), 20),
    "a few calls a segment": (StoreSpec(segment_bytes=8_000, keep_bytes=0), 20),
    "a segment a call": (StoreSpec(segment_bytes=1, keep_bytes=60_000), 10),
    "every call synced": (StoreSpec(fsync="call", segment_bytes=20_000), 10),
}


@pytest.mark.parametrize(("spec", "seeds"), SPECS.values(), ids=SPECS)
def test_after_any_power_failure_a_run_resumes_from_the_newest_checkpoint_that_counted(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: StoreSpec, seeds: int
) -> None:
    snapshots = 0
    for seed in range(seeds):
        rng, run = random.Random(seed), Run(fakes, spec)
        folder = tmp_path / f"{seed}-0"
        for failure in range(4):
            folder.mkdir(exist_ok=True)
            disk = Disk(folder, monkeypatch)
            disk.left = rng.randint(0, 40 if spec.fsync == "segment" else 90) if rng.random() < 0.7 else 10**9
            try:
                run.open(folder)
                for _ in range(rng.randint(0, 6)):
                    run.update()
                    if rng.random() < 0.4:
                        run.save()
            except PowerFailure:
                pass
            folder = tmp_path / f"{seed}-{failure + 1}"
            folder.mkdir()
            disk.after_failure(rng, folder)
        monkeypatch.undo()
        run.open(folder)
        for _ in range(3):
            run.update()
        run.close()
        snapshots += run.snapshots
    assert snapshots >= 2 * seeds


class Killed(BaseException):
    """Nothing may catch it, as nothing runs on after a kill."""


def test_a_kill_at_any_step_of_a_snapshot_changes_nothing(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one while the segment before it is closed."""
    run, before, steps = Run(fakes, StoreSpec(segment_bytes=12_000)), tmp_path / "before", list[str]()
    (folder := tmp_path / "log").mkdir()
    run.open(folder)
    while "_00000000.snapshot" not in steps:  # the oldest of three, which goes
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(folder, before)
        events, checkpoints, counts = list(run.events), list(run.checkpoints), run.counts
        steps = watched(monkeypatch, 10**9, run.update)
    run.close()
    assert len(steps) >= 12
    for kill_at in range(len(steps)):
        shutil.copytree(before, again := tmp_path / str(kill_at))
        run.events, run.synced, run.checkpoints, run.counts = list(events), 0, list(checkpoints), counts
        run.open(again)
        with suppress(Killed):
            watched(monkeypatch, kill_at, run.update)
        run.close()
        told = len(run.events)
        run.open(again)
        assert len(run.events) >= told
        assert not list(again.rglob(".*tmp*"))
        run.close()


def watched(monkeypatch: pytest.MonkeyPatch, kill_at: int, work: Callable[[], None]) -> list[str]:
    """The files that are renamed or deleted, and what is synced, while it works; it is killed at one of these."""
    steps: list[str] = []

    def step(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            if len(steps) == kill_at:
                raise Killed
            steps.append(str(args[0]).rpartition("/")[2])
            return real(*args, **named)

        return run

    with monkeypatch.context() as patched:
        for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (Path, "unlink")):
            patched.setattr(owner, name, step(getattr(owner, name)))
        work()
    return steps


def test_what_the_log_says_is_on_the_disk_before_a_segment_is_deleted(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, after = tmp_path / "log", tmp_path / "after"
    folder.mkdir()
    after.mkdir()
    run = Run(fakes, StoreSpec(segment_bytes=1, keep_bytes=0))
    run.open(folder)
    run.update()
    disk = Disk(folder, monkeypatch)
    run.core.context.log._append([ev.CheckpointRetained(1)])
    assert run.core.context.log.truncate(set()) > 0
    for name, inode in disk.names.items():  # nothing but what was synced
        (after / name).parent.mkdir(exist_ok=True)
        (after / name).write_bytes(disk.bytes[inode])
    monkeypatch.undo()
    assert ev.CheckpointRetained(1) in ReplayLog(after).find(ev.CheckpointRetained)
    run.close()


def test_checkpoints_delete_no_rollout(fakes: SimpleNamespace, tmp_path: Path) -> None:
    run = Run(fakes, StoreSpec(segment_bytes=8_000))
    run.open(tmp_path)
    for _ in range(12):
        run.update()
        run.save()  # of which two stay
    run.close()
    submitted = [(e.group, e.rollout) for e in run.events if isinstance(e, ev.RolloutSubmitted)]
    assert len(list((tmp_path / "rows").glob("*.parquet"))) > 3
    rows = ReplayReader(tmp_path).rollouts(["group", "rollout"]).to_pydict()
    assert list(zip(rows["group"], rows["rollout"], strict=True)) == submitted
    assert len(submitted) >= 24


class Finished(NamedTuple):
    """Six updates in one tail a stream, with checkpoints after 0, 2 and 4 updates, all retained."""

    folder: Path
    events: list[ev.Event]
    synced: dict[str, int]  # bytes of each tail at the last checkpoint

    def damaged(self, folder: Path, stem: str, data: bytes) -> Path:
        """A copy in which the tail of one stream holds `data`."""
        shutil.copytree(self.folder, folder)
        path = folder / f"{stem}/_00000000.tail"
        path.write_bytes(data)
        return path

    def tail(self, stem: str) -> bytes:
        return (self.folder / f"{stem}/_00000000.tail").read_bytes()


@pytest.fixture(scope="module")
def finished(fakes: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    run, folder = Run(fakes, StoreSpec()), tmp_path_factory.mktemp("finished")
    run.open(folder)
    synced: dict[str, int] = {}
    for update in range(1, 7):
        run.update()
        if update in (2, 4):
            run.bench.checkpointed(0)
            synced = {stem: (folder / f"{stem}/_00000000.tail").stat().st_size for stem in ("rows", "events")}
    run.close()
    return Finished(folder, run.events, synced)


def resumable(events: list[ev.Event]) -> list[int]:
    """The checkpoints of `finished` that a learner may resume from after these events."""
    ledger = accounting(events)
    return [update for update in (0, 2, 4) if not ledger.lineage().refusal(Version(1, update))]


@pytest.mark.parametrize("stem", ["rows", "events"])
def test_a_tail_that_ends_anywhere_leaves_the_newest_checkpoint_before_that(
    finished: Finished, tmp_path: Path, stem: str
) -> None:
    data, rng = finished.tail(stem), random.Random(1)
    found = set()
    for number, cut in enumerate(sorted(rng.sample(range(len(data)), 120))):
        zeros = number % 2 * (len(data) - cut)
        if zeros and cut < finished.synced[stem]:
            continue  # damage, below
        path = finished.damaged(tmp_path / str(number), stem, data[:cut] + bytes(zeros))
        log = ReplayLog(path.parents[1])
        history = state(log.history)
        assert history == finished.events[: len(history)]
        rows = [e for e in history if isinstance(e, ev.RolloutSubmitted)]
        answers = log.take([e.row for e in rows], ["response_ids"]).column("response_ids").to_pylist()
        assert answers == [response(e.group, e.rollout) for e in rows]
        committed = max((e.version.update for e in history if isinstance(e, ev.BatchCommitted)), default=0)
        fenced = any(isinstance(e, ev.LearnerFenced) for e in history)
        assert resumable(history) == [update for update in (0, 2, 4) if fenced and update <= committed]
        found.add(tuple(resumable(history)))
        assert cut < finished.synced[stem] or 4 in resumable(history)
    assert found >= {(0,), (0, 2), (0, 2, 4)}


@pytest.mark.parametrize("stem", ["rows", "events"])
@pytest.mark.parametrize(("size", "damage"), [(1, lambda old: bytes([old[0] ^ 1])), (400, lambda old: bytes(400))])
def test_damage_in_what_was_synced_is_named_and_can_be_given_up(
    finished: Finished, tmp_path: Path, stem: str, size: int, damage: Callable[[bytes], bytes]
) -> None:
    data, rng = finished.tail(stem), random.Random(2)
    for number, place in enumerate(rng.sample(range(finished.synced[stem] - len(MARK) - size), 40)):
        wrong = data[:place] + damage(data[place : place + size]) + data[place + size :]
        path = finished.damaged(tmp_path / str(number), stem, wrong)
        with pytest.raises(DataError, match=r"is damaged at byte \d+ of \d+, .* restore it from a copy; or give up") as caught:
            ReplayLog(path.parents[1])
        found = re.search(r"`truncate -s (\d+) (.*)`", str(caught.value))
        assert found is not None
        assert (Path(found[2]), int(found[1]) < place + size) == (path, True)
        os.truncate(path, int(found[1]))
        history = state(ReplayLog(path.parents[1]).history)
        assert history == finished.events[: len(history)]


@pytest.mark.parametrize("stem", ["rows", "events"])
def test_damage_in_what_was_not_synced_is_dropped(finished: Finished, tmp_path: Path, stem: str) -> None:
    data, rng = finished.tail(stem), random.Random(3)
    for number in range(30):
        wrong = bytearray(data)
        wrong[rng.randrange(finished.synced[stem], len(data))] ^= 1
        history = state(ReplayLog(finished.damaged(tmp_path / str(number), stem, bytes(wrong)).parents[1]).history)
        assert history == finished.events[: len(history)]
        assert resumable(history) == [0, 2, 4]


@pytest.mark.parametrize("stem", ["rows", "events"])
def test_a_closed_segment_is_not_read_where_a_bit_is_wrong(fakes: SimpleNamespace, tmp_path: Path, stem: str) -> None:
    run, folder, rng = Run(fakes, StoreSpec(segment_bytes=20_000)), tmp_path / "log", random.Random(4)
    run.open(folder)
    for _ in range(8):
        run.update()
    run.close()
    path = folder / stem / "00000000.parquet"
    data = path.read_bytes()
    for place in rng.sample(range(len(data)), 60):
        wrong = bytearray(data)
        wrong[place] ^= 1 << rng.randrange(8)
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=f"{stem}/00000000"):
            read_all(folder)


def read_all(folder: Path) -> None:
    log = ReplayLog(folder)  # which begins with a snapshot
    log.take([0], ["response_ids"])
    list(log.find(ev.Ended))


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_snapshot_that_is_damaged_is_passed_over(
    fakes: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: int
) -> None:
    run, folder, rng = Run(fakes, StoreSpec(segment_bytes=12_000)), tmp_path / "log", random.Random(5)
    run.open(folder)
    while not (folder / "events/_00000002.snapshot").exists():
        run.update()
    run.close()
    older, newest = sorted(folder.glob("events/_*.snapshot"))  # the first of three is gone
    read = len(ReplayLog(shutil.copytree(folder, tmp_path / "whole")).history)
    for number in range(20):
        again = shutil.copytree(folder, tmp_path / str(number))
        for path in (newest, older)[:damaged]:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (again / "events" / path.name).write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        caplog.clear()
        log = ReplayLog(again)
        assert caplog.text.count("is damaged, or of another version") == damaged
        assert bool(log.state) == (damaged == 1)
        assert len(log.history) > read
        assert StoreCore(run.bench.plan, log, run.bench.clock).ledger == accounting(run.events)


def test_a_lost_row_costs_only_the_calls_from_the_first_that_names_it(fakes: SimpleNamespace, tmp_path: Path) -> None:
    run = Run(fakes, StoreSpec())
    run.open(tmp_path)
    for _ in range(60):
        run.update()
    run.close()
    tail = tmp_path / "rows/_00000000.tail"
    os.truncate(tail, tail.stat().st_size - 1)
    history = state(ReplayLog(tmp_path).history)
    last = max(e.row for e in run.events if isinstance(e, ev.RolloutSubmitted))
    first = next(i for i, e in enumerate(run.events) if isinstance(e, ev.RolloutSubmitted) and e.row == last - 1)
    assert history == run.events[:first]
