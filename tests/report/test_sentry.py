"""Sentinels as queries: what holds, what is refused before anything starts, and that no query reaches beyond its tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from asyncrl.config import Recipe, SentinelSpec, entropy_collapse, length_explosion, one_answer, reward_hacking
from asyncrl.errors import ConfigError

pytest.importorskip("duckdb")
from asyncrl.report import sentry

ROLLOUTS = pa.schema(
    [
        ("group", pa.int64()),
        ("rollout", pa.int32()),
        ("row", pa.int64()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("status", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("trained_update", pa.int64()),
        ("age", pa.int64()),
    ]
)
NEEDED = {"name": "r", "model": {"path": "m"}, "data": {"files": ["f"]}, "reward": {"function": "m:f"}, "total_steps": 99}


@pytest.fixture(scope="module")
def database() -> Any:
    made = sentry.Database()
    yield made
    made.close()


def recipe(sentinels: dict[str, SentinelSpec], **fields: Any) -> Recipe:
    return msgspec.structs.replace(msgspec.convert(NEEDED | fields, Recipe), sentinels=sentinels)


def asked(
    database: Any, spec: SentinelSpec | str, updates: list[dict[str, Any]], rollouts: Sequence[dict[str, Any]] = ()
) -> Any:
    spec = SentinelSpec(when=spec) if isinstance(spec, str) else spec
    query = sentry.SentinelQuery("x", spec, ROLLOUTS)
    given = pa.Table.from_pylist([*rollouts], ROLLOUTS) if query.columns else query.nothing()["rollouts"]
    newest = max((row["step"] for row in updates), default=0)
    return database.holds(
        query, {"updates": query.updates(updates, newest), "rollouts": given.select(query.columns or given.column_names)}
    )


def series(name: str, values: list[float | None], **others: list[float]) -> list[dict[str, Any]]:
    named = {name: values, **{key.replace("__", "/"): column for key, column in others.items()}}
    return [
        {"step": step, **{key: column[step - 1] for key, column in named.items() if column[step - 1] is not None}}
        for step in range(1, len(values) + 1)
    ]


@pytest.mark.parametrize(
    ("when", "count", "rows"),
    [
        ('"actor/entropy" < 0.3', 1, [{"step": 3, "actor/entropy": 0.25}]),  # of the newest update alone
        ('"actor/entropy" < 0.25;', 0, []),
        ('"reward/of_nobody" > 0', 0, []),  # null holds of nothing
        ('select avg("actor/entropy") < 0.6 as low from updates', 1, [{"low": True}]),
        ('select avg("actor/entropy") < 0.1 from updates', 0, []),
        ('select max("reward/of_nobody") > 1 from updates', 0, []),
        ('from updates select step where "actor/entropy" <= 0.5', 2, [{"step": 2}, {"step": 3}]),
        ("select step, age from updates where age = 1", 1, [{"step": 2, "age": 1}]),
        ("select reward > 0.5 as good from rollouts", 1, [{"good": True}]),
        (
            "from rollouts where status = 'invalid'",  # without tokens and texts, which it does not name
            1,
            [{"group": 8, "rollout": 1, "status": "invalid", "trained_update": 3, "age": 0}],
        ),
        ("select logprobs from rollouts where len(logprobs) > 1", 1, [{"logprobs": [-0.5, -1.0]}]),
    ],
)
def test_what_holds_and_the_rows_that_say_so(database: Any, when: str, count: int, rows: list[dict[str, Any]]) -> None:
    updates = series("actor/entropy", [1.0, 0.5, 0.25])
    rollouts = [
        {"group": 8, "rollout": 0, "reward": 1.0, "status": "ok", "logprobs": [-0.5, -1.0], "trained_update": 3, "age": 0},
        {"group": 8, "rollout": 1, "reward": None, "status": "invalid", "logprobs": [-0.5], "trained_update": 3, "age": 0},
    ]
    assert asked(database, when, updates, rollouts) == (count, rows)


def test_many_rows_are_counted_and_some_kept(database: Any) -> None:
    count, rows = asked(database, "select step from updates", series("actor/entropy", [0.5] * 250))
    assert (count, len(rows)) == (250, sentry.KEPT_ROWS)


@pytest.mark.parametrize(
    ("now", "holds"), [(0.09, True), (0.11, False), (0.45, False)]
)  # 0.45: as in the arithmetic recipe, which solves its task
def test_entropy_collapse_is_against_the_first_updates(database: Any, now: float, holds: bool) -> None:
    falling = [1.0] * 10 + [0.5] * 10 + [now] * 5
    assert asked(database, entropy_collapse(), series("actor/entropy", falling))[0] == holds
    assert asked(database, entropy_collapse(share=now + 0.01), series("actor/entropy", falling))[0] == 1
    assert asked(database, entropy_collapse(), series("actor/entropy", [1.0] * 10 + [now] * 4))[0] == 0  # too early to say


@pytest.mark.parametrize(("now", "holds"), [(2.0, True), (1.85, False)])  # 1.85: once in a run of lengths 1 to 160
def test_length_explosion_is_within_twenty_updates(database: Any, now: float, holds: bool) -> None:
    growing = [10.0] * 5 + [12.0] * 10 + [10.0 * now] * 5
    cut = [0.0] * 15 + [0.5] * 5
    count, rows = asked(database, length_explosion(), series("response_length/mean", growing, response_length__clip_ratio=cut))
    assert count == holds
    assert rows == [{"before": 10.0, "now": 20.0, "cut_off": 0.5}] * holds
    assert asked(database, length_explosion(), series("response_length/mean", growing[1:]))[0] == 0


@pytest.mark.parametrize(
    ("scores", "reward_rises", "holds"),
    [
        ([0.4, 0.8, 0.6, 0.5], True, True),
        ([0.4, 0.8, 0.6, 0.79], True, False),  # the newest is back
        ([0.4, 0.8, 0.74, 0.73], True, False),  # by less than a tenth
        ([0.4, 0.8, 0.6, 0.5], False, False),  # what falls as the reward does is no hack
        ([0.8, 0.5], True, False),  # one score below the best may be chance
        ([], True, False),
    ],
)
def test_reward_hacking_is_a_reward_that_does_not_carry_over(
    database: Any, scores: list[float], reward_rises: bool, holds: bool
) -> None:
    updates = series("reward/mean", [step / 50 if reward_rises else 1 - step / 50 for step in range(1, 41)])
    for i, score in enumerate(scores):
        updates[10 * i]["eval/score"] = score
    count, rows = asked(database, reward_hacking(), updates)
    assert count == 2 * holds
    if holds:
        assert [(row["best_update"], row["update"], row["best_score"], row["score"]) for row in rows] == [
            (11, 21, 0.8, 0.6),
            (11, 31, 0.8, 0.5),
        ]
        assert rows[0]["reward_then"] == pytest.approx(9 / 50)  # the mean of updates 7 to 11


def test_a_reward_is_hacked_from_the_first_update_on(database: Any) -> None:
    updates = series("reward/mean", [step / 50 for step in range(1, 21)])
    updates[9]["eval/score"] = updates[19]["eval/score"] = 0.1
    count, rows = asked(database, reward_hacking(), [{"step": 0, "eval/score": 0.9}, *updates])
    assert (count, rows[0]["best_update"], rows[0]["reward_then"]) == (2, 0, 1 / 50)


def test_one_answer_is_a_response_that_most_prompts_get_and_did_not_before(database: Any) -> None:
    def said(update: int, same: int) -> list[dict[str, Any]]:
        texts = ["yes" if row < same else f"it is {row}" for row in range(10)]
        return [
            {
                "row": row,
                "response": text,
                "reward": 1.0,
                "age": 20 - update,
                "trained_update": update,
                "group": row,
                "rollout": 0,
            }
            for row, text in enumerate(texts)
        ]

    now = [rollout for update in range(16, 21) for rollout in said(update, 6)]
    count, rows = asked(database, one_answer(), [], now + said(3, 1))
    assert (count, rows) == (1, [{"response": "yes", "reward": 1.0, "share": 0.6, "share_before": 0.1}])
    assert asked(database, one_answer(), [], now + said(3, 4))[0] == 0  # it always was so
    assert asked(database, one_answer(share=0.6), [], now + said(3, 1))[0] == 0


# -------------------------------------------------------------------------------------------- before anything starts


def test_sentinels_that_can_be_run_are_a_line_of_the_plan() -> None:
    ready = {
        "entropy": entropy_collapse(then="stop"),
        "length": length_explosion(),
        "hack": reward_hacking(),
        "same": one_answer(),
    }
    told = "entropy (stop), length (warn), hack (warn), same (warn)"
    assert sentry.check_sentinels(recipe(ready, evaluation={"files": ["g"]}), ROLLOUTS) == told
    with pytest.raises(ConfigError, match=r"hack.*: there will be no 'eval/score', as evaluation\.files is empty"):
        sentry.check_sentinels(recipe(ready), ROLLOUTS)


def test_figures_of_an_own_loss_are_its_own() -> None:
    own = {"x": SentinelSpec(when='"actor/surprise" > 1 or "reward/format" < 0.5')}
    assert sentry.check_sentinels(recipe(own, algorithm={"policy_loss": "m:loss"}), ROLLOUTS) == "x (warn)"
    with pytest.raises(ConfigError, match=r"there is no metric 'actor/surprise'"):
        sentry.check_sentinels(recipe(own), ROLLOUTS)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ('"eval/scor" < 1', r"there is no metric 'eval/scor'; did you mean 'eval/score'\?"),
        ('"actor/entropi" < 1', r"sentinels\.x\.when='.*': there is no metric 'actor/entropi'; did you mean 'actor/entropy'\?"),
        ("actor/entropy < 1", r'metrics stand in double quotes: "actor/entropy"'),
        ("from rollouts where rewrd > 1", r"there is no column 'rewrd'; did you mean 'reward'\?"),
        (
            "select no_such_thing_at_all from updates",
            r"there is no column 'no_such_thing_at_all'; docs/metrics\.md and docs/sentinels\.md say",
        ),
        ("select step from updatez where true", r"Table with name updatez does not exist!\nDid you mean \"updates\"\?"),
        ('"actor/entropy" <', r"Parser Error: syntax error"),
        ("select 1; select 2", r"it is not one query"),
        ("with a as (select 1) insert into updates from a", r"it is not one query"),
        ("select count(*) from updates", r"holds before the first update, of empty tables, so it would fire at once"),
        ("select from_json('{}', 1, 2) from updates", r"No function matches|does not exist|Error"),
    ],
)
def test_what_can_not_be_run_is_refused_with_what_there_is(when: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sentry.check_sentinels(recipe({"x": SentinelSpec(when=when)}), ROLLOUTS)


def test_without_duckdb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentry, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sentinels \(x\) need DuckDB, .* pip install 'asyncrl\[sentinels\]'"):
        sentry.check_sentinels(recipe({"x": SentinelSpec(when="false")}), ROLLOUTS)


# ---------------------------------------------------------------------------------------------- what a query can't do


@pytest.mark.parametrize(
    "when",
    [
        "from '{file}'",
        "from read_csv('{file}')",
        "from glob('{folder}/*')",
        "from read_text('{file}')",
        "from 'https://example.com/a.parquet'",
    ],
)
def test_no_query_reads_files_or_the_network(database: Any, tmp_path: Path, when: str) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.raises(sentry.QueryError, match=r"file system operations are disabled by configuration"):
        asked(database, when.format(file=tmp_path / "a.csv", folder=tmp_path), [])


@pytest.mark.parametrize(
    "statement", ["copy updates to '{}/x.csv'", "attach '{}/x.db'", "set threads=8", "export database '{}'"]
)
def test_no_statement_writes_or_changes_settings(database: Any, tmp_path: Path, statement: str) -> None:
    """As if a query could hold one: `holds` takes nothing but a select."""
    with pytest.raises(database._duckdb.Error, match=r"disabled by configuration|has been locked"):
        database._connection.execute(statement.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_query_that_takes_too_long_is_given_up(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentry, "LOOK_S", 0.2)
    with pytest.raises(sentry.QueryError, match=r"took longer than 0\.2 s"):
        asked(database, "select max(a.range * b.range) < 0 from range(10000000) a, range(10000000) b", [])
    assert asked(database, "select true", [])[0] == 1  # the next one goes on


def test_what_fired_is_a_line_of_json_and_some_lines_of_text() -> None:
    rows = [{"step": step, "response": "7" * 200, "share": 0.123456789} for step in range(5)]
    told = sentry.Fired(time=1.5, step=20, sentinel="same", event="fired", then="stop", when="select …", count=5, rows=rows)
    assert json.loads(told.encode())["rows"] == rows
    first, *shown = str(told).splitlines()
    assert first == "sentinel same fired at update 20: select …"
    assert shown[0] == f"  step=0, response='{'7' * 99}…, share=0.1235"
    assert shown[-1] == "  … 5 rows in all"
    assert len(shown) == 4
