"""What every metric is: its unit, its meaning, and what verl, TRL and prime-rl call it. docs/metrics.md lists it.

A name in the table may hold `{a,b}`, one of these, and `<what>`, which the run says: a data source, an actor, a lag.
"""

import csv
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

# To document a metric: a line there, and `python docs/metrics.py`.
TABLE = Path(__file__).with_name("names.csv")
_ACTORS = {
    "generator": r"generator-\d+",
    "reward": r"reward-\d+",
    "model": r"model-\d+\.\d+",
    "rank": r"critic|reference|\w+-\d+",
}
_WHAT = {
    **_ACTORS,
    "actor": "|".join(("learner", "store", *_ACTORS.values())),
    **dict.fromkeys(("lag", "k", "turn"), r"-?\d+"),
    "state": r"[\w:]+",
}  # of all else: anything


class MetricName(NamedTuple):
    """A row of the table."""

    kind: str  # of the lines that have it
    name: str
    unit: str
    meaning: str
    verl: str
    trl: str
    prime_rl: str

    def each(self) -> Iterator[str]:
        """The names that `{a,b}` stands for."""
        parts = re.split(r"\{([^}]*)\}", self.name)
        for chosen in product(*(part.split(",") if at % 2 else [part] for at, part in enumerate(parts))):
            yield "".join(chosen)


class Described(NamedTuple):
    """What a metric's name stands for."""

    row: MetricName
    name: str  # with `<what>` as the table has it
    what: dict[str, str]  # and what that is


@cache
def table() -> tuple[MetricName, ...]:
    with TABLE.open() as file:
        return tuple(MetricName(*row) for row in list(csv.reader(file))[1:])


@cache
def described(metric: str) -> Described | None:
    """The row of a metric, as metrics.jsonl or a tracker has it; None: it is not in the table.

    An evaluation has figures of episodes too, and one of several has its setting's name behind `eval/`.
    """
    name = metric.removeprefix("actors/")
    forms: list[tuple[str, dict[str, str]]] = [(name, {})]
    if name.startswith("eval/"):
        _, first, *rest = name.split("/")
        setting, of_setting = {"setting": first}, "/".join(rest)
        forms += [(name.removeprefix("eval/"), {}), (f"eval/{of_setting}", setting), (of_setting, setting)]
    for form, setting in forms:
        for pattern, row, exact in _patterns():
            if found := pattern.fullmatch(form):
                return Described(row, exact, found.groupdict() | setting)
    share = f"{name}_s"  # of the time, which metrics.jsonl has in seconds
    return described(share) if metric != name and not name.endswith("_s") and re.match(_WHAT["actor"], name) else None


@cache
def prometheus_name(metric: str) -> tuple[str, dict[str, str]]:
    """What Prometheus calls a metric, without Ray's `ray_` before it, and its labels: what the run says of `<what>`.

    `reward/mean/<source>` is `asyncrl_reward_mean_by_source`; a `<what>` that is not at the end is left out of the name.
    """
    known = described(metric)
    name, labels = (known.name, known.what) if known is not None else (metric, {})
    if known is not None and known.row.kind == "actors":
        name = f"actors/{name.replace('<state>_s', '<state>')}"
        labels = {"actor" if what in _ACTORS else what: said for what, said in labels.items()}
    if metric.startswith("eval/"):
        name, labels = f"eval/{name.removeprefix('eval/')}", {"setting": "", **labels}
    plain = re.sub(r"<\w+>/?", "", re.sub(r"(?<=[/_@])<(\w+)>$", r"by_\1", name))
    return "asyncrl_" + re.sub(r"\W+", "_", plain), labels


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], MetricName, str], ...]:
    """Those with the fewest free words first, then those that say most themselves."""
    found = []
    for row in table():
        for name in row.each():
            parts = re.split(r"<(\w+)>", name)
            made = (f"(?P<{part}>{_WHAT.get(part, '.+')})" if at % 2 else re.escape(part) for at, part in enumerate(parts))
            found.append((re.compile("".join(made)), row, name))
    return tuple(sorted(found, key=lambda one: (one[2].count("<"), -len(re.sub("<.*?>", "", one[2])))))
