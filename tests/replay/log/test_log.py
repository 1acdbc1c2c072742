"""The log survives a cut at any byte, and says so when it is damaged."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl.config import StoreSpec
from asyncrl.errors import DataError, Unavailable
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.log import events as ev
from asyncrl.replay.log import rows as schema
from asyncrl.replay.log.log import ReplayLog, locked
from asyncrl.replay.log.segments import Segments
from asyncrl.types import Version


def rows(fakes: SimpleNamespace, group: int, count: int = 2, tokens: int = 40) -> pa.RecordBatch:
    (ticket,) = fakes.Bench(fakes.plan()).reserve(1, 0).tickets
    made = [fakes.rollout(ticket, i, Version(1, 0), tokens, group=group) for i in range(count)]
    return schema.from_ipc(schema.encode_rollouts(made, "run"))


def submit(log: ReplayLog, fakes: SimpleNamespace, group: int) -> list[ev.Event]:
    """One group as two calls: reserved, then its two rows."""
    reserved = ev.GroupReserved(group, "train", group, 0, 2, 0, "gen", 1)
    log.append_events([reserved])
    first = log.append_rows(rows(fakes, group))
    submitted = [ev.RolloutSubmitted(group, i, 0, first + i, 0, 0, 40) for i in range(2)]
    log.append_events(submitted)
    return [reserved, *submitted]


def state(events: list[ev.Event]) -> list[ev.Event]:
    return [e for e in events if not isinstance(e, ev.SegmentClosed | ev.SegmentDropped)]


@pytest.mark.parametrize("segment_bytes", [1, 5_000, 1 << 20])
def test_a_reopened_log_holds_all_that_was_acknowledged(fakes: SimpleNamespace, tmp_path: Path, segment_bytes: int) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=segment_bytes))
    written = [e for g in range(12) for e in submit(log, fakes, g)]
    again = ReplayLog(tmp_path, StoreSpec(segment_bytes=segment_bytes))  # no close: a kill
    assert state(again.history) == written
    assert again.take([23, 0, 7], ["group", "rollout"]).to_pylist() == [
        {"group": 11, "rollout": 1},
        {"group": 0, "rollout": 0},
        {"group": 3, "rollout": 1},
    ]
    assert state(ReplayLog(tmp_path).history) == written  # and once more


def test_closed_segments_are_plain_arrow_files(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=5_000))
    for group in range(12):
        submit(log, fakes, group)
    closed = sorted(tmp_path.glob("rows-*.arrow"))
    assert len(closed) > 1
    table = pa.concat_tables(pa.ipc.open_file(str(path)).read_all() for path in closed)
    assert table.column("group").to_pylist()[:4] == [0, 0, 1, 1]
    assert pa.ipc.open_file(str(sorted(tmp_path.glob("events-*.arrow"))[0])).read_all().column("kind")[0].as_py() == "reserved"


def test_rows_no_event_names_are_forgotten(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path)
    written = submit(log, fakes, 0)
    log.append_rows(rows(fakes, 99))  # killed before the event
    log = ReplayLog(tmp_path)
    written += submit(log, fakes, 1)
    log = ReplayLog(tmp_path)
    assert state(log.history) == written
    assert log.take([2, 3], ["group"]).to_pylist() == [{"group": 1}, {"group": 1}]


@pytest.fixture(scope="module")
def written(fakes: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ev.Event]]:
    folder = tmp_path_factory.mktemp("written")
    log = ReplayLog(folder, StoreSpec(segment_bytes=12_000))
    return folder, [e for g in range(10) for e in submit(log, fakes, g)]


@given(seed=st.integers(0, 2**32 - 1), which=st.sampled_from(["rows", "events", "both"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tails_cut_at_any_byte_recover_to_an_acknowledged_prefix(
    fakes: SimpleNamespace,
    written: tuple[Path, list[ev.Event]],
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    which: str,
) -> None:
    source, events = written
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("cut")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for tail in [t for stem in ("rows", "events") if which in (stem, "both") for t in folder.glob(f"{stem}-*.tail")]:
        data = tail.read_bytes()
        tail.write_bytes(data[: rng.randint(0, len(data))])
    log = ReplayLog(folder, StoreSpec(segment_bytes=12_000))
    found = state(log.history)
    assert found == events[: len(found)]
    named = [e.row for e in found if isinstance(e, ev.RolloutSubmitted)]
    assert log.take(named, ["group"]).column("group").to_pylist() == [
        e.group for e in found if isinstance(e, ev.RolloutSubmitted)
    ]
    ledger = Ledger(max_lag=4)
    for event in log.history:
        ledger.apply(event)
    more = submit(log, fakes, ledger.next_group)  # and it goes on
    assert state(ReplayLog(folder).history) == found + more
    shutil.rmtree(folder)


def test_a_segment_closed_just_before_a_kill_is_found(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path)
    written = submit(log, fakes, 0)
    log._rows.close_segment()  # killed before the event that notes it
    (tmp_path / "rows-00000000.tail").write_bytes(b"left over")
    (tmp_path / "rows-00000001.writing").write_bytes(b"half")
    log = ReplayLog(tmp_path)
    written += submit(log, fakes, 1)
    assert state(ReplayLog(tmp_path).history) == written
    assert log.take([1, 3], ["group"]).to_pylist() == [{"group": 0}, {"group": 1}]
    assert not list(tmp_path.glob("*.writing"))


@pytest.mark.parametrize("stem", ["rows", "events"])
def test_a_damaged_segment_is_named(fakes: SimpleNamespace, tmp_path: Path, stem: str) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))
    for group in range(3):
        submit(log, fakes, group)
    path = tmp_path / f"{stem}-00000001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{stem}-00000001"):
        ReplayLog(tmp_path).take(range(6), ["group"])


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    other = pa.record_batch({"group": [1]})
    with pa.OSFile(str(tmp_path / "rows-00000000.tail"), "wb") as sink, pa.ipc.new_stream(sink, other.schema) as writer:
        writer.write_batch(other)
    with pytest.raises(DataError, match="has the schema of another version"):
        ReplayLog(tmp_path)


def test_a_missing_segment_is_named(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))
    for group in range(3):
        submit(log, fakes, group)
    (tmp_path / "rows-00000001.arrow").unlink()
    with pytest.raises(DataError, match="deleted"):
        ReplayLog(tmp_path).take([2], ["group"])


def test_truncation_keeps_segments_with_wanted_groups(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))  # a segment per call
    written = [e for g in range(4) for e in submit(log, fakes, g)]
    assert log.truncate({1, 3}) == 2
    assert sorted(log._groups) == [s.number for s in log._rows.closed]  # and no others
    assert log.take([2, 6], ["group"]).to_pylist() == [{"group": 1}, {"group": 3}]
    with pytest.raises(DataError, match="row 0 of rows was deleted"):
        log.take([0], ["group"])
    log = ReplayLog(tmp_path)
    assert state(log.history) == written
    assert log.take([2, 6], ["group"]).to_pylist() == [{"group": 1}, {"group": 3}]
    assert log.append_rows(rows(fakes, 4)) == 8  # numbers go on
    assert log.truncate(set()) == 2
    assert ReplayLog(tmp_path).append_rows(rows(fakes, 4)) == 8


def test_every_call_can_be_synced(fakes: SimpleNamespace, tmp_path: Path) -> None:
    written = submit(ReplayLog(tmp_path, StoreSpec(fsync="call")), fakes, 0)
    assert state(ReplayLog(tmp_path).history) == written


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    first = locked(tmp_path, 1.0)
    with pytest.raises(Unavailable, match="still open in another process"):
        locked(tmp_path, 0.05)
    first.close()
    locked(tmp_path, 10.0).close()  # also after the waiter that gave up had its turn


def test_many_small_calls_are_joined_in_memory(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path)
    for group in range(300):
        log.append_rows(rows(fakes, group, tokens=1))
    assert len(log._rows.batches) == 300 // 128 + 300 % 128
    picked = log.take([599, 0, 256, 255, 511], ["group", "rollout"]).to_pydict()
    assert picked == {"group": [299, 0, 128, 127, 255], "rollout": [1, 0, 0, 1, 1]}


def test_rows_are_found_across_the_chunks_of_a_closed_segment(tmp_path: Path) -> None:
    numbers = pa.schema([("x", pa.int64())])
    stream = Segments(tmp_path, "rows", numbers, False, {})
    for start in range(0, 9000, 1500):
        stream.append(pa.record_batch([pa.array(range(start, start + 1500))], schema=numbers))
    stream.close_segment()
    stream.append(pa.record_batch([pa.array([9000])], schema=numbers))
    assert stream.take([8999, 4096, 4095, 9000, 0], ["x"]).column("x").to_pylist() == [8999, 4096, 4095, 9000, 0]
