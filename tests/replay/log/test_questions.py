"""The queries of docs/history.md, as they stand there, on a log that is being written: what they count is known."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncrl.config import StoreSpec
from asyncrl.replay.client import ReplayClient
from asyncrl.replay.store import ReplayStore
from asyncrl.types import Score, Version

duckdb = pytest.importorskip("duckdb")
PAGE = (Path(__file__).parents[3] / "docs" / "history.md").read_text()
QUESTIONS = dict(re.findall(r"^([^\n`]+\?[^\n]*)\n\n```sql\n(.*?)^```$", PAGE, re.M | re.S))


ANSWERS: list[tuple[str, Any]] = [
    (
        "How does the reward go",
        [{"data_source": source, "since": 0, "rollouts": 6, "reward": mean} for source, mean in (("even", 1.0), ("odd", 0.2))],
    ),
    (
        "How many groups taught nothing",
        [{"trained_update": u, "groups": 2, "without_spread": share} for u, share in ((1, 0.5), (2, 0.5), (3, 1.0))],
    ),
    ("How many rollouts say word for word", [{"trained_update": update, "duplicates": 0.25} for update in (1, 2, 3)]),
    (
        "Does length pay",
        [
            {"reward": reward, "rollouts": count, "tokens": tokens, "p90": tokens, "cut_off": 0.0}
            for reward, count, tokens in ((1.0, 6, 2), (0.5, 2, 4), (0.0, 3, 4))
        ],
    ),
    (
        "What could not be scored",
        [{"status": "invalid", "error": "no number", "rollouts": 1, "newest_group": 5, "response": "another"}],
    ),
    (
        "How old were the trained tokens",
        [{"trained_update": update, "mean_lag": update - 1, "worst_lag": update - 1} for update in (1, 2, 3)],
    ),
    # 2 · (2 + 4) tokens an update, from 10 s to 15 s, and 3 of the group in flight, from 1 s on.
    ("How fast is each generator", [{"worker": "gen", "tokens_per_s": pytest.approx(39 / 14), "rollouts": 13}]),
    (
        "How sure is the policy",
        [{"trained_update": update, "logprob": -0.5, "least": -0.5} for update in (1, 2, 3)],
    ),
    ("Which prompts has nobody ever solved", []),
    (
        "What became of the groups",
        [{"outcome": "trained", "groups": 6, "rollouts": 12}, {"outcome": "pending", "groups": 1, "rollouts": 1}],
    ),
    ("How many updates did restores undo", [{"update": 3, "times": 2, "counts": 2}]),
]


@pytest.fixture
def run(fakes: SimpleNamespace, tmp_path: Path, loop: Any) -> Path:
    """Three updates of two groups of two, all sampled from the first weights, the third made twice; and a group in flight.

    Of each update one group says the same twice and earns 1, the other says two things and earns 0 and 0.5; of the last update
    the second of these could not be scored."""
    run = tmp_path / "run"
    client = ReplayClient(
        loop.transport(ReplayStore(fakes.plan(max_lag=9, batch=2), run / "replay", StoreSpec(segment_bytes=12_000))), "all", 1
    )
    first = Version(client.fence(0).incarnation, 0)
    for update in (1, 2, 3):
        for i, ticket in enumerate(client.reserve(2, first, [], 1.0).tickets):
            texts, rewards = (["same"] * 2, [1.0] * 2) if i == 0 else (["one", "another"], [0.0, 0.5])
            times = {"reserved": 9.0, "started": 10.0, "finished": 12.0 + update}
            answers = [{"text": text, "prompt_text": f"prompt {i}", "times": times, "tokens": 2 + 2 * i} for text in texts]
            client.submit([fakes.rollout(ticket, j, first, **answers[j]) for j in ticket.rollouts])
            scores = [fakes.score(ticket, j, rewards[j]) for j in ticket.rollouts]
            if (update, i) == (3, 1):
                scores[1] = Score(group=ticket.group, rollout=1, attempt=0, status="invalid", error="no number")
            client.score(0, scores)
        lease = client.lease_batch(update - 1, 1.0)
        client.commit(lease.lease, Version(1, update), {})
    client.fence(2)
    lease = client.lease_batch(2, 1.0)
    client.commit(lease.lease, Version(2, 3), {})
    (ticket,) = client.reserve(1, Version(2, 3), [], 1.0).tickets
    client.submit([fakes.rollout(ticket, 0, first, text="late", prompt_text="prompt 2")])
    assert list((run / "replay/rows").glob("*.parquet"))
    assert list((run / "replay/rows").glob("_*.tail"))
    return run


@pytest.mark.parametrize(("question", "answer"), ANSWERS)
def test_the_query_answers_its_question(run: Path, question: str, answer: list[dict[str, Any]]) -> None:
    assert tables(run, question) == answer


def test_the_slowest_rollouts_are_those_that_took_longest(run: Path) -> None:
    found = tables(run, "Where did the slowest rollouts")
    assert [row["generated"] for row in found] == [5.0] * 4 + [4.0] * 4 + [3.0] * 2  # the newest first, ten of them
    assert all(row["scored"] >= 0 and row["to_the_store"] > 0 for row in found)


def test_every_question_has_an_answer_here() -> None:
    tested = (*(question for question, _ in ANSWERS), "Where did the slowest rollouts")
    assert [text for text in QUESTIONS if not text.startswith(tested)] == []
    assert len(QUESTIONS) == len(tested) >= 12


def test_a_dataset_reads_a_part_of_the_closed_segments(run: Path) -> None:
    (block,) = [block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "pc.field" in block]
    *setting, last = ast.parse(block.replace("runs/gsm8k", str(run)).replace('== "length"', '== "stop"')).body
    names: dict[str, Any] = {}
    exec(compile(ast.Module(setting, []), "history.md", "exec"), names)
    assert isinstance(last, ast.Expr)
    table = eval(compile(ast.Expression(last.value), "history.md", "eval"), names)
    assert table.column_names == ["prompt", "response"]
    assert 0 < table.num_rows < 13  # of a run that goes on: without the tail


def tables(run: Path, question: str) -> list[dict[str, Any]]:
    """What the query gives over the tables that the page makes, of the run as it stands."""
    (block,) = [block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "events = " in block]
    names: dict[str, Any] = {}
    exec(block.replace("runs/gsm8k", str(run)), names)
    (text,) = [text for text in QUESTIONS if text.startswith(question)]
    rollouts, events = names["rollouts"], names["events"]
    assert (rollouts.num_rows, events.num_rows > 0) == (13, True)
    found = duckdb.sql(QUESTIONS[text])  # which finds both by their names
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
