"""The log survives a cut at any byte, and says so when it is damaged."""

import base64
import os
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl.config import StoreSpec
from asyncrl.errors import DataError, Unavailable
from asyncrl.replay.ledger import Ledger
from asyncrl.replay.log import events as ev
from asyncrl.replay.log import rows as schema
from asyncrl.replay.log import segments, snapshots
from asyncrl.replay.log.log import ReplayLog, locked
from asyncrl.replay.log.reader import ReplayReader
from asyncrl.replay.log.rows import ROWS_3
from asyncrl.replay.log.segments import Segments
from asyncrl.replay.log.tail import record
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


def test_closed_segments_are_plain_parquet_files(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=5_000))
    for group in range(12):
        submit(log, fakes, group)
    assert len(list((tmp_path / "rows").glob("*.parquet"))) > 1
    assert pq.read_table(tmp_path / "rows").column("group").to_pylist()[:4] == [0, 0, 1, 1]
    assert pq.read_table(tmp_path / "events").column("kind")[0].as_py() == "reserved"


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
    for tail in [t for stem in ("rows", "events") if which in (stem, "both") for t in (folder / stem).glob("*.tail")]:
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


class Killed(BaseException):
    """Nothing may catch it, as nothing runs on after a kill."""


@pytest.mark.parametrize("kill_at", range(12))
def test_a_kill_while_segments_are_closed_leaves_every_row_once(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    log = ReplayLog(tmp_path)
    written = [e for g in range(3) for e in submit(log, fakes, g)]
    steps: list[str] = []

    def step(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            steps.append(name)
            if len(steps) > kill_at:
                if name == "write":
                    Path(args[0]).write_bytes(b"PAR1 and half of it")
                raise Killed
            return real(*args, **named)

        return run

    monkeypatch.setattr(segments, "_write_closed", step("write", segments._write_closed))
    monkeypatch.setattr(segments, "sync", step("sync", segments.sync))
    monkeypatch.setattr(segments.os, "rename", step("rename", os.rename))
    monkeypatch.setattr(Path, "unlink", step("unlink", Path.unlink))
    with pytest.raises(Killed) if kill_at < 11 else nullcontext():
        log.seal()
    monkeypatch.undo()
    whole = ["write", "sync", "rename", "sync", "unlink", "sync"]  # the last one is of the folder, with the events' new tail
    assert steps == [*whole[:5], *whole][: kill_at + 1]

    expected = [(g, i) for g in range(3) for i in range(2)]
    read = ReplayReader(tmp_path)
    assert state([ev.decode(p) for p in read.events().column("payload").to_pylist()]) == written
    assert [tuple(row.values()) for row in read.rollouts(["group", "rollout"]).to_pylist()] == expected
    log = ReplayLog(tmp_path)
    assert state(log.history) == written
    assert [tuple(row.values()) for row in log.take(range(6), ["group", "rollout"]).to_pylist()] == expected
    assert [tuple(row.values()) for row in read.rollouts(["group", "rollout"]).to_pylist()] == expected
    assert pq.read_table(tmp_path / "rows").num_rows == 6  # and for who reads only the closed ones
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".writing"]


def test_a_tail_without_room_to_close_it_stays(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, table: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    log = ReplayLog(tmp_path)
    written = submit(log, fakes, 0)
    monkeypatch.setattr(segments, "_write_closed", full)
    log.seal()
    log.close()
    monkeypatch.undo()
    assert "stays in its tails" in caplog.text
    assert not list(tmp_path.rglob("*.writing"))  # which would take room for nothing
    assert ReplayReader(tmp_path).rollouts().num_rows == 2
    assert state(ReplayLog(tmp_path).history) == written


@pytest.mark.parametrize("stem", ["rows", "events"])
def test_a_damaged_segment_is_named(fakes: SimpleNamespace, tmp_path: Path, stem: str) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))
    for group in range(3):
        submit(log, fakes, group)
    path = tmp_path / stem / "00000001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{stem}/00000001"):
        ReplayLog(tmp_path).take(range(6), ["group"])


def test_a_log_of_another_version_is_refused(fakes: SimpleNamespace, tmp_path: Path) -> None:
    other = pa.record_batch({"group": [1]})
    (tmp_path / "schema/rows").mkdir(parents=True)
    (tmp_path / "schema/rows/_00000000.tail").write_bytes(record(other.schema.serialize()) + record(other.serialize()))
    (tmp_path / "names").mkdir()
    (tmp_path / "names/rows-00000000.arrow").touch()  # how schema 2 was kept
    (tmp_path / "closed/rows").mkdir(parents=True)
    pq.write_table(pa.Table.from_batches([rows(fakes, 0)]).replace_schema_metadata({"asyncrl.rows": "2"}),
                   tmp_path / "closed/rows/00000000.parquet")  # fmt: skip
    for name in ("schema", "names", "closed"):
        for reads in (ReplayLog, lambda folder: ReplayReader(folder).rollouts()):
            with pytest.raises(
                DataError, match=r"rows.00000000\.\w+ was written by another version|_00000000.tail was written"
            ):
                reads(tmp_path / name)


def test_a_log_of_the_version_before_is_read_and_not_gone_on_with(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))
    for group in range(2):
        submit(log, fakes, group)
    log.close()
    whole = ReplayReader(tmp_path).rollouts()
    old = rows(fakes, 1).select(ROWS_3.names).replace_schema_metadata(ROWS_3.metadata)
    closed, tail = tmp_path / "rows/00000000.parquet", tmp_path / "rows/_00000001.tail"
    pq.write_table(pq.read_table(closed).select(ROWS_3.names).replace_schema_metadata(ROWS_3.metadata), closed)
    for path in (tmp_path / "rows").glob("*00000001*"):
        path.unlink()
    tail.write_bytes(record(ROWS_3.serialize()) + record(old.serialize()))
    read = ReplayReader(tmp_path).rollouts()
    assert read.column_names == whole.column_names
    assert read.equals(whole)
    assert read["segments"].to_pylist() == [None] * len(whole)
    with pytest.raises(DataError, match="was written by another version"):
        ReplayLog(tmp_path)


def test_a_missing_segment_is_named(fakes: SimpleNamespace, tmp_path: Path) -> None:
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))
    for group in range(3):
        submit(log, fakes, group)
    (tmp_path / "rows/00000001.parquet").unlink()
    with pytest.raises(DataError, match="deleted"):
        ReplayLog(tmp_path).take([2], ["group"])


def test_nothing_is_deleted_within_the_bound_and_nothing_needed_past_it(
    fakes: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def deleting() -> int:
        return caplog.text.count("from now on the oldest are deleted")

    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1))  # a segment per call; the default bound
    written = [e for g in range(6) for e in submit(log, fakes, g)]
    assert log.truncate([]) == 0
    sizes = [path.stat().st_size for path in sorted((tmp_path / "rows").glob("*.parquet"))]
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1, keep_bytes=sum(sizes)))
    assert log.truncate([]) == 0
    assert deleting() == 0
    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1, keep_bytes=sum(sizes) - sizes[1] - 1))
    assert log.truncate([0, 7]) == 2  # the oldest two but for the first, which is needed
    assert deleting() == 1
    assert log.take([0, 1, 6, 8], ["group"]).column("group").to_pylist() == [0, 0, 3, 4]
    with pytest.raises(DataError, match="row 2 of rows was deleted"):
        log.take([2], ["group"])

    log = ReplayLog(tmp_path, StoreSpec(segment_bytes=1, keep_bytes=0))
    assert state(log.history) == written
    assert log.truncate([0, 7, 11, -1]) == 1  # rows 8 and 9
    assert log.append_rows(rows(fakes, 6)) == 12  # numbers go on
    assert log.truncate([]) == 3
    assert ReplayLog(tmp_path).append_rows(rows(fakes, 7)) == 12
    assert deleting() == 1, "it is said once"


def test_a_restart_begins_with_the_newest_snapshot(fakes: SimpleNamespace, tmp_path: Path) -> None:
    """Which is due when as many bytes of events were closed since the one before it: however much is outstanding, snapshots
    cost no more than events."""
    spec = StoreSpec(segment_bytes=1)
    log = ReplayLog(tmp_path, spec)
    assert not log.due
    written = submit(log, fakes, 0)
    assert log.due
    before, calls = log.events_closed, 0
    log.snapshot(bytes(40_000))
    while not log.due:
        calls, written = calls + 1, submit(log, fakes, calls + 1)
    assert 5 < calls < 40  # of a few kB each
    again = ReplayLog(tmp_path, spec)
    assert again.state == bytes(40_000)
    assert len(again.history) == again.events_closed - before
    assert state(again.history)[-len(written) :] == written
    again.snapshot(b"newer")
    assert ReplayLog(tmp_path, spec).state == b"newer"
    assert [e.group for e in again.find(ev.GroupReserved)] == list(range(calls + 1))


WRITTEN = [  # a little of everything that a ledger holds
    ev.LearnerFenced(1, 0, 1.0),
    *(ev.GroupReserved(g, "train", g, 0, 2, 0, "gen", 3, g == 0) for g in range(4)),
    *(ev.RolloutSubmitted(g, i, 0, 3 * g + i, 0, 0, 5) for g in range(2) for i in range(3 - g)),
    *(ev.RolloutScored(g, i, 0, "ok", 0.5, {"exact": 1.0}) for g in range(2) for i in range(3 - g)),
    ev.BatchLeased(1, 0, (0,), False),
    ev.BatchCommitted(1, Version(1, 1), (0,), {"loss": 2.0}, 3.0),
    ev.BatchLeased(2, 1, (1,), False),
    ev.HolderDied("gen", 3, (2, 3)),
    ev.GroupSettled(2, "failed", True, "deadly"),
    ev.GroupExcused(3),
    ev.EvalRequested(Version(1, 1)),
    ev.GroupReserved(4, "eval", 0, 0, 1, 1, "gen", 4),
]
FORMAT_1 = (  # what they come to
    "3gAep21heF9sYWcEpmdyb3Vwc4IBnQGldHJhaW4BAAAAo2dlbgOSmQMAAAAFom9ryz/gAAAAAAAAgaVleGFjdMs/8AAAAAAAAMsAAAAAAAAAAJ"
    "kEAAAABaJva8s/4AAAAAAAAIGlZXhhY3TLP/AAAAAAAADLAAAAAAAAAAACAADCA50DpXRyYWluAwAAAKADkpn/AAAAAMDLAAAAAAAAAACAywAA"
    "AAAAAAAAmf8AAAAAwMsAAAAAAAAAAIDLAAAAAAAAAAACAgLDpXRha2VukQGlcmVhZHmQpmN1cnNvcgSncmV0cmllc5GSAgGmbGVhc2VzgQKVpm"
    "xlYXNlZAIBkQHCqHJlb3BlbmVkgKdjb21taXRzgQGFpWxlYXNlAad2ZXJzaW9ukgEBpmdyb3Vwc5GdAKV0cmFpbgAAAACjZ2VuA5OZAAAAAAWi"
    "b2vLP+AAAAAAAACBpWV4YWN0yz/wAAAAAAAAywAAAAAAAAAAmQEAAAAFom9ryz/gAAAAAAAAgaVleGFjdMs/8AAAAAAAAMsAAAAAAAAAAJkCAA"
    "AABaJva8s/4AAAAAAAAIGlZXhhY3TLP/AAAAAAAADLAAAAAAAAAAACAADCp3RyYWluZWQCrnRyYWluZWRfdG9rZW5zCqljb21taXR0ZWQBqHJl"
    "dGFpbmVkAKtpbmNhcm5hdGlvbgGmZmVuY2VzgQEAqm5leHRfZ3JvdXAFqm5leHRfbGVhc2UDqHJlc2VydmVkBKhvdXRjb21lc4WndHJhaW5lZA"
    "GoZmlsdGVyZWQAp2V2aWN0ZWQApmZhaWxlZAGmdW51c2VkAKVyb3VuZIOndmVyc2lvbpIBAaZncm91cHOBBJ0EpGV2YWwAAAABo2dlbgSRmf8A"
    "AAAAwMsAAAAAAAAAAIDLAAAAAAAAAAABAQHCqHVuc2NvcmVkAaZxdWV1ZWTAp2V4Y3VzZWQBrGVtcHR5X2dyb3VwcwGqbGFzdF9lcnJvcqCncm"
    "Vjb3Jkc5GFqHNlcXVlbmNlAaR0aW1ly0AIAAAAAAAApGtpbmSkc3RlcKd2ZXJzaW9ukgEBp21ldHJpY3OBpGxvc3PLQAAAAAAAAAClbm90ZWQB"
    "p2xlbmd0aHOEqmRpc3BhdGNoZWQEsWRpc3BhdGNoZWRfdG9rZW5zFKd0cmFpbmVkAq50cmFpbmVkX3Rva2VucwqkZGllZAGmZGVhdGhzgZKldH"
    "JhaW4DkKhnaXZlbl91cIGSpXRyYWluAqZkZWFkbHmnd29ya2Vyc4GjZ2VuBKVlbmRlZMI="
)


def test_a_snapshot_of_this_format_is_read_as_it_was_meant() -> None:
    """Whoever changes the ledger so that this fails, raises `_FORMAT` of snapshots, and writes the new text down here."""
    ledger = Ledger(max_lag=4)
    for event in WRITTEN:
        ledger.apply(event)
    assert snapshots._FORMAT == 1
    assert Ledger.load(base64.b64decode(FORMAT_1), 4) == ledger, base64.b64encode(ledger.dump())


def test_after_a_snapshot_it_is_known_which_segments_were_deleted_and_which_are_only_away(
    fakes: SimpleNamespace, tmp_path: Path
) -> None:
    log, spec = ReplayLog(tmp_path / "log", StoreSpec(segment_bytes=1)), StoreSpec(segment_bytes=1, keep_bytes=0)
    for group in range(5):
        submit(log, fakes, group)
    folder, away = tmp_path / "log/rows", tmp_path / "away"
    shutil.copytree(folder, away)
    (folder / "00000001.parquet").unlink()
    log = ReplayLog(tmp_path / "log", spec)
    assert log.truncate([2, 8]) == 3
    submit(log, fakes, 5)
    log.snapshot(b"what all came to")
    for path in away.glob("*.parquet"):  # a copy of the one that was away; of the others what a power failure did not delete
        shutil.copy(path, folder)
    log = ReplayLog(tmp_path / "log", spec)
    assert log.take([2, 3, 8, 9], ["group"]).column("group").to_pylist() == [1, 1, 4, 4]
    assert [path.name[:8] for path in sorted(folder.glob("*.parquet"))] == ["00000001", "00000004", "00000005"]
    assert log.append_rows(rows(fakes, 6)) == 12


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


def test_rows_are_found_across_the_chunks_of_closed_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = pa.schema([("x", pa.int64())])
    monkeypatch.setattr(segments, "_CHUNK_BYTES", 4096 * 8)
    monkeypatch.setattr(segments, "_OPEN_FILES", 2)
    stream = Segments(tmp_path, "rows", numbers, {})
    for start in range(0, 9000, 1500):
        stream.append(pa.record_batch([pa.array(range(start, start + 1500))], schema=numbers))
    stream.close_segment()
    for row in range(9000, 9003):
        stream.append(pa.record_batch([pa.array([row])], schema=numbers))
        stream.close_segment()
    stream.append(pa.record_batch([pa.array([9003])], schema=numbers))
    wanted = [8999, 9001, 4096, 9003, 4095, 9000, 0, 9002]
    assert stream.take(wanted, ["x"]).column("x").to_pylist() == wanted
    assert stream._reader.cache_info().currsize == 2  # however long the history is
