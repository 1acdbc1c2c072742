"""What docs/history.md prints works, with the tools that it names, on a run that goes on, was killed, or has ended."""

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from asyncrl.config import StoreSpec
from asyncrl.errors import DataError
from asyncrl.replay import open as open_replay
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.store import ReplayStore
from asyncrl.report.metrics_log import MetricsLog
from asyncrl.types import Record, Report, Version

PAGE = Path(__file__).parents[3] / "docs" / "history.md"
GROUPS = 40


@pytest.fixture(params=["live", "killed", "finished"])
def state(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(fakes: SimpleNamespace, tmp_path: Path, loop: Any, state: str) -> Path:
    """40 groups of two rollouts with rewards 0 and 1, in two closed segments and a tail. A kill cut a record short."""
    run = tmp_path / "run"
    store = ReplayStore(fakes.plan(max_lag=40, batch=1, size=GROUPS), run / "replay", StoreSpec(segment_bytes=20_000))
    call = loop.transport(store)
    client = ReplayClient(call, "all", 1)
    client.fence(0)
    for ticket in client.reserve(GROUPS, Version(1, 0), [], 1.0).tickets:
        answers = [{"text": f"it is {i}", "prompt_text": f"prompt {ticket.group}"} for i in ticket.rollouts]
        client.submit([fakes.rollout(ticket, i, Version(1, 0), **answers[i]) for i in ticket.rollouts])
        client.score(0, [fakes.score(ticket, i, float(i)) for i in ticket.rollouts])
    assert len(list((run / "replay/rows").glob("*.parquet"))) >= 2
    if state == "killed":
        shutil.copytree(run, tmp_path / "killed")
        run = tmp_path / "killed"
        (tail,) = (run / "replay/rows").glob("*.tail")
        with tail.open("ab") as file:
            file.write(tail.read_bytes()[-100:])
    if state == "finished":
        loop.run(store.close())
    metrics = MetricsLog(run / "metrics.jsonl")
    metrics.append(Record(sequence=1, time=1.0, kind="step", version=Version(1, 1), metrics={"loss": 0.5}))
    metrics.append(Record(sequence=2, time=2.0, kind="eval", version=Version(1, 1), metrics={"eval/score": 0.25}))
    metrics.append_actors(3.0, 1, [Report(name="learner", role="learner", seconds={"busy": 1.0}, gauges={})])
    metrics.close()
    return run


@pytest.fixture
def printed(run: Path) -> Callable[[str], list[Any]]:
    """What the expressions give in the block of the page whose text holds a word."""

    def evaluate(word: str) -> list[Any]:
        blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
        (block,) = [block for block in blocks if word in block]
        names: dict[str, Any] = {}
        found = []
        for node in ast.parse(block.replace("runs/gsm8k", str(run))).body:
            if isinstance(node, ast.Expr):
                found.append(eval(compile(ast.Expression(node.value), str(PAGE), "eval"), names))
            else:
                exec(compile(ast.Module([node], []), str(PAGE), "exec"), names)
        return found

    return evaluate


def test_everything_is_read_through_asyncrl_whatever_became_of_the_run(printed: Callable[[str], list[Any]]) -> None:
    for tool in ("pandas", "duckdb"):
        pytest.importorskip(tool)
    frame, none, few = printed("rollouts.to_pandas()")
    assert len(frame) == few.num_rows == 2 * GROUPS
    assert set(zip(frame["group"], frame["response"], frame["reward"], strict=True)) == {
        (group, f"it is {i}", float(i)) for group in range(GROUPS) for i in (0, 1)
    }
    assert none.fetchall() == []  # nothing is trained yet
    assert few.column_names == ["response", "reward", "trained_update"]


def test_pandas_duckdb_and_pyarrow_read_the_closed_segments_by_themselves(
    printed: Callable[[str], list[Any]], state: str
) -> None:
    for tool in ("pandas", "duckdb"):
        pytest.importorskip(tool)
    frame, relation, table = printed("pandas.read_parquet")
    keys = list(zip(frame["group"], frame["rollout"], strict=True))
    assert keys == [(g, i) for g in range(GROUPS) for i in (0, 1)][: len(keys)]
    assert table.select(["group", "rollout"]).to_pylist() == [{"group": g, "rollout": i} for g, i in keys]
    assert relation.project('"group", rollout').order('"group", rollout').fetchall() == keys
    assert relation.project("count(response)").fetchall() == [(len(keys),)]
    (scored,) = printed("join")
    lines = scored.fetchall()
    assert {(f"prompt {g}", f"it is {i}", "null", float(i)) for g, i in keys} >= set(lines)
    if state == "finished":
        assert len(keys) == len(lines) == 2 * GROUPS
    else:
        assert 0 < len(keys) < 2 * GROUPS


def test_metrics_come_as_a_table_of_each_kind(printed: Callable[[str], list[Any]]) -> None:
    pytest.importorskip("pandas")
    (tables,) = printed("metrics.jsonl")
    assert {kind: list(table.columns[3:]) for kind, table in tables.items()} == {
        "actors": ["learner/busy_s"],
        "eval": ["step", "incarnation", "eval/score"],
        "step": ["step", "incarnation", "loss"],
    }


def test_a_damaged_page_of_a_closed_segment_is_named(run: Path) -> None:
    path = run / "replay/rows/00000000.parquet"
    chunk = pq.read_metadata(path).row_group(0)
    columns = {chunk.column(i).path_in_schema: chunk.column(i) for i in range(chunk.num_columns)}
    logprobs = columns["logprobs.list.element"]
    data = bytearray(path.read_bytes())
    data[logprobs.data_page_offset + logprobs.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows/00000000\.parquet is not a readable Parquet file"):
        open_replay(run).rollouts()
    assert open_replay(run).rollouts(["response"]).num_rows == 2 * GROUPS  # which is elsewhere in it
