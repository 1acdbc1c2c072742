"""What the events of a log say of its rollouts, column by column, and joined to their rows: no object per rollout."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import asyncrl.replay.log.events as ev

KEYS = ["group", "rollout", "attempt"]
JOINED = pa.schema(
    [
        ("status", pa.string()),  # null: not scored yet
        ("reward", pa.float64()),
        ("parts", pa.map_(pa.string(), pa.float64())),
        ("error", pa.string()),
        ("said", pa.map_(pa.string(), pa.string())),  # by judges, by the name of their term
        (
            "scorer",
            pa.string(),
        ),  # the process that scored it, from when to when; null: none, or not known
        ("scoring_began", pa.float64()),
        ("scoring_ended", pa.float64()),
        ("outcome", pa.string()),  # of the group; null: pending
        ("trained_update", pa.int64()),  # null unless trained
        ("submitted_time", pa.float64()),
        ("scored_time", pa.float64()),
    ]
)
EVENT_COLUMNS = ["kind", "time", *KEYS, "status", "reward", "payload"]  # what a `Verdicts` is made of

_TOLD: dict[str, Callable[[Any], Any]] = {  # of a verdict's event; only its payload has them
    "parts": lambda event: list(event.parts.items()),
    "error": lambda event: event.error,
    "said": lambda event: list(event.said.items()),
    "scorer": lambda event: event.scoring and event.scoring[0],
    "scoring_began": lambda event: event.scoring and event.scoring[1],
    "scoring_ended": lambda event: event.scoring and event.scoring[2],
}
_FATES = (ev.GroupReserved, ev.GroupSettled, ev.GroupsUnused, ev.BatchCommitted, ev.LearnerFenced, ev.Ended)
_JOINED_BYTES = 1 << 30  # Arrow takes from a column by joining it, which fails for texts of more than 2 GiB


class Verdicts:
    """Of a piece of the events, what rollouts and groups came to."""

    def __init__(self, events: pa.Table, columns: Sequence[str], groups: Sequence[int] | None) -> None:
        """columns: those of JOINED among them are wanted. groups: only the rollouts of these."""
        told = [name for name in columns if name in _TOLD]
        kind = events.column("kind")
        ends = pa.array([one.__struct_config__.tag for one in _FATES])
        self.fates = events.filter(pc.is_in(kind, ends)).column("payload").combine_chunks()
        found = [events.filter(pc.equal(kind, one.__struct_config__.tag)) for one in (ev.RolloutSubmitted, ev.RolloutScored)]
        submitted, scored = found if groups is None else [only_groups(table, groups) for table in found]
        self.submitted = submitted.select([*KEYS, "time"])
        self.scored = scored.select([*KEYS, "time", "status", "reward"])
        verdicts = [ev.decode(payload) for payload in scored.column("payload").to_pylist()] if told else []
        for name in told:
            values = pa.array(map(_TOLD[name], verdicts), JOINED.field(name).type)
            self.scored = self.scored.append_column(name, values)


def only_groups(table: pa.Table, groups: Sequence[int]) -> pa.Table:
    """The lines of these groups."""
    return table.filter(pc.is_in(table.column("group"), pa.array(groups, pa.int64())))


def join_verdicts(rows: pa.Table, pieces: Sequence[Verdicts]) -> pa.Table:
    """The rows that count, with all of JOINED that the pieces hold."""
    submitted, scored = (pa.concat_tables([getattr(p, name) for p in pieces]) for name in ("submitted", "scored"))
    keys, counted, judged = _codes(rows, submitted, scored)
    # A later row of a rollout also has its token rewards.
    keep = np.isin(keys, counted) & (_places(keys, keys).to_numpy() == np.arange(len(keys)))
    table, keys = rows.filter(pa.array(keep)), keys[keep]  # not `take`: its texts may have more than 2 GiB
    at = _places(keys, judged)
    for name in scored.column_names[len(KEYS) + 1 :]:
        table = table.append_column(name, _taken(scored.column(name), at))
    table = table.append_column("scored_time", scored.column("time").take(at))
    table = table.append_column("submitted_time", submitted.column("time").take(_places(keys, counted)))
    outcomes, updates = _fates(payload for piece in pieces for payload in piece.fates.to_pylist())
    groups, line = np.unique(table.column("group").to_numpy(), return_inverse=True)
    for name, known in (("outcome", outcomes), ("trained_update", updates)):
        values = pa.array([known.get(group) for group in groups.tolist()], JOINED.field(name).type)
        table = table.append_column(name, values.take(pa.array(line)))
    return table


def _fates(payloads: Iterable[bytes]) -> tuple[dict[int, str], dict[int, int]]:
    """The outcome of each group that has one, and the update that trained it; the events in order."""
    outcomes: dict[int, str] = {}
    trained: dict[int, int] = {}
    reserved: set[int] = set()
    for event in map(ev.decode, payloads):
        if isinstance(event, ev.GroupReserved) and event.purpose == "train":
            reserved.add(event.group)
        elif isinstance(event, ev.GroupSettled):
            outcomes[event.group] = event.outcome
        elif isinstance(event, ev.GroupsUnused):
            outcomes.update(dict.fromkeys(event.groups, "unused"))
        elif isinstance(event, ev.BatchCommitted):
            outcomes.update(dict.fromkeys(event.groups, "trained"))
            trained.update(dict.fromkeys(event.groups, event.version.update))
        elif isinstance(event, ev.LearnerFenced):
            for group in [g for g, update in trained.items() if update > event.committed]:
                del trained[group], outcomes[group]
        elif isinstance(event, ev.Ended):
            outcomes.update(dict.fromkeys(reserved - outcomes.keys(), "unused"))
    return outcomes, trained


def _codes(*tables: pa.Table) -> list[np.ndarray]:
    """For the lines of each table numbers that are equal where their keys are."""
    keys = [[table.column(name).to_numpy().astype(np.int64) for name in KEYS] for table in tables]
    rollouts, attempts = (max((int(key[i].max()) + 1 for key in keys if len(key[i])), default=1) for i in (1, 2))
    return [(group * rollouts + rollout) * attempts + attempt for group, rollout, attempt in keys]


def _places(codes: np.ndarray, among: np.ndarray) -> pa.Array:
    """Where each code stands last; null where it does not."""
    order = among.argsort(kind="stable")
    at = np.searchsorted(among, codes, side="right", sorter=order) - 1
    places = order[at] if len(order) else at
    return pa.array(places, mask=(at < 0) | (among[places] != codes) if len(order) else at < 0)


def _taken(column: pa.ChunkedArray, places: pa.Array) -> pa.ChunkedArray | pa.Array:
    if column.nbytes < _JOINED_BYTES:
        return column.take(places)
    values: list[Any] = column.to_pylist()
    return pa.array([None if at is None else values[at] for at in places.to_pylist()], column.type)
