"""Sentinels as queries: over which columns, whether they hold, and what is said of it. The only place that knows DuckDB.

A query sees two tables, `updates` and `rollouts`, in a database of its own in memory: no file, no network, nothing that lasts.
"""

import difflib
import re
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import msgspec
import pyarrow as pa
from msgspec import Struct

from asyncrl.config import LOSS_NAMES, Recipe, SentinelSpec
from asyncrl.errors import ConfigError
from asyncrl.report.names import described, table

LOOK_S = 10.0  # a query that takes longer is given up
KEPT_ROWS = 100  # of what a query returns
_SHOWN_ROWS, _SHOWN = 3, 100  # of those in a message, and characters of each value
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "threads": "1",
    "memory_limit": "1GB",
    "enable_external_access": "false",  # files, network, other databases, extensions; nothing is spilled to the disk
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
}
UPDATES = pa.schema([("step", pa.int64()), ("incarnation", pa.int64()), ("time", pa.float64()), ("age", pa.int64())])
_ALWAYS = ("group", "rollout", "trained_update", "age")  # of rollouts, in every query
_KINDS = ("update", "evaluation")  # of metrics, in their table
_QUERY = re.compile(r"\s*(select|from|with)\b", re.IGNORECASE)
_QUOTED = re.compile(r'"([^"]+)"')
_UNQUOTED = re.compile(r'(?<![\w/"])[a-z_]+/[a-z_]+(?![\w/"])')
_NO_COLUMN = re.compile(r'column "(.*?)" not found')


class SentinelQuery:
    """What a sentinel asks. A metric is what stands in double quotes and has a `/` in its name, or is one of `updates`."""

    def __init__(self, name: str, spec: SentinelSpec, rollouts: pa.Schema) -> None:
        """rollouts: all columns that there could be."""
        self.name, self.spec = name, spec
        condition = spec.when.strip().rstrip(";")
        quoted = [word for word in _QUOTED.findall(condition) if "/" in word or word == "samples"]
        self.metrics = tuple(dict.fromkeys(quoted))
        self.sql = condition
        if not _QUERY.match(condition):
            shown = ", ".join(f'"{metric}"' for metric in ("step", *self.metrics))
            self.sql = f"select {shown} from updates where age = 0 and ({condition})"
        self.of_rollouts = re.search(r"\brollouts\b", self.sql) is not None
        named = [c for c in rollouts.names if c in _ALWAYS or re.search(rf"(?<!\w){c}(?!\w)", self.sql)]
        self.columns = tuple(named) if self.of_rollouts else ()
        self._schemas = {"updates": UPDATES, "rollouts": pa.schema([rollouts.field(name) for name in self.columns or _ALWAYS])}

    def updates(self, rows: Sequence[Mapping[str, Any]], newest: int = 0) -> pa.Table:
        """A table of the named metrics, a row for each update; null where it has none."""
        fields = [*UPDATES, *(pa.field(metric, pa.float64()) for metric in self.metrics)]
        columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in fields}
        return pa.table(columns | {"age": pa.array([newest - row["step"] for row in rows], pa.int64())})

    def nothing(self) -> dict[str, pa.Table]:
        """Both tables before the first update."""
        return {"updates": self.updates([]), "rollouts": self._schemas["rollouts"].empty_table()}


class Database:
    """Where queries run. One thread at a time."""

    def __init__(self) -> None:
        import duckdb  # here, as only who has sentinels needs it

        self._duckdb = duckdb
        self._connection = duckdb.connect(":memory:", config=_CONFIG)

    def holds(self, query: SentinelQuery, tables: Mapping[str, pa.Table]) -> tuple[int, list[dict[str, Any]]]:
        """How many rows say that the condition holds (0: it does not), and the first of them. Raises QueryError."""
        for name, given in tables.items():
            self._connection.register(name, given)
        watch = threading.Timer(LOOK_S, self._connection.interrupt)
        watch.daemon = True
        watch.start()
        try:
            statements = self._connection.extract_statements(query.sql)
            if len(statements) != 1 or statements[0].type != self._duckdb.StatementType.SELECT:
                raise QueryError("it is not one query: write one `select …`, `from …` or `with …`")
            result = self._connection.execute(statements[0])
            names = [column[0] for column in result.description]
            found = result.fetchall()
        except self._duckdb.InterruptException:
            raise QueryError(f"it took longer than {LOOK_S:g} s: narrow it, or lower its window") from None
        except self._duckdb.Error as error:
            raise QueryError(str(error)) from error
        finally:
            watch.cancel()
        if len(names) == 1 and all(value is None or isinstance(value, bool) for (value,) in found):
            found = [row for row in found if row[0] is True]
        return len(found), [dict(zip(names, row, strict=True)) for row in found[:KEPT_ROWS]]

    def close(self) -> None:
        self._connection.close()


class QueryError(Exception):
    """A query that can't be run, in DuckDB's words."""


class Fired(Struct, frozen=True, kw_only=True):
    """A line of sentinels.jsonl: a condition began to hold, or no longer does."""

    time: float
    step: int  # the newest update that it was looked at with
    sentinel: str
    event: str  # `fired` or `over`
    then: str
    when: str
    count: int = 0  # of the rows that the query returned
    rows: list[dict[str, Any]] = []  # the first of them

    def encode(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    def __str__(self) -> str:
        """For people: what fired, and its first rows."""
        lines = [f"sentinel {self.sentinel} fired at update {self.step}: {self.when}"]
        for row in self.rows[:_SHOWN_ROWS]:
            lines.append("  " + ", ".join(f"{name}={_brief(value)}" for name, value in row.items()))
        return "\n".join(lines + [f"  … {self.count} rows in all"] * (self.count > _SHOWN_ROWS))


def _brief(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# -------------------------------------------------------------------------------------------- before anything starts


def check_sentinels(recipe: Recipe, rollouts: pa.Schema) -> str:
    """A line of the plan. Raises ConfigError for the first that can't be run, names what there is not, or holds of nothing.

    rollouts: the columns that there are.
    """
    sentinels = recipe.sentinels
    if find_spec("duckdb") is None:
        raise ConfigError(
            f"sentinels ({', '.join(sentinels)}) need DuckDB, which is not installed: pip install 'asyncrl[sentinels]', or "
            "leave them out"
        )
    database = Database()
    try:
        for name, spec in sentinels.items():
            _check(database, SentinelQuery(name, spec, rollouts), recipe, rollouts)
    finally:
        database.close()
    return ", ".join(f"{name} ({spec.then})" for name, spec in sentinels.items())


def _check(database: Database, query: SentinelQuery, recipe: Recipe, rollouts: pa.Schema) -> None:
    where = f"sentinels.{query.name}.when={query.spec.when!r}"
    for metric in query.metrics:
        if not _may_come(metric, recipe):
            raise ConfigError(f"{where}: there is no metric {metric!r}{_nearest(metric, _metrics())}")
        if metric.startswith("eval/") and not recipe.evaluation.files:
            raise ConfigError(f"{where}: there will be no {metric!r}, as evaluation.files is empty; name held-out prompts")
    try:
        count, _ = database.holds(query, query.nothing())
    except QueryError as error:
        text = str(error)
        if plain := _UNQUOTED.search(query.spec.when):
            text = f'metrics stand in double quotes: "{plain[0]}" ({text.splitlines()[0]})'
        elif missing := _NO_COLUMN.search(text):
            there = [*UPDATES.names, *_metrics(), *(rollouts.names if query.of_rollouts else [])]
            text = f"there is no column {missing[1]!r}{_nearest(missing[1], there)}"
        raise ConfigError(f"{where}: {text}") from error
    if count:
        raise ConfigError(
            f"{where} holds before the first update, of empty tables, so it would fire at once; put what must be so into "
            "`where` or `having`, e.g. `having count(*) >= 10`"
        )


def _may_come(metric: str, recipe: Recipe) -> bool:
    """Whether a run of the recipe may have it, as far as that is known before."""
    known = described(metric)
    if known is None or known.row.kind not in _KINDS:
        return False
    return known.name != "actor/<figure>" or recipe.algorithm.policy_loss not in LOSS_NAMES  # a figure of the user's own loss


def _metrics() -> list[str]:
    return [name for row in table() if row.kind in _KINDS for name in row.each() if "<" not in name]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "; docs/metrics.md and docs/sentinels.md say which there are"
