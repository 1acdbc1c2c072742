"""What the log says of a run, in arrays: read column by column and a piece at a time, so that the millions of events of a long
run cost no object each. Only the few that name groups or restarts are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import asyncrl.replay.log.events as ev
from asyncrl.replay.log.reader import ReplayReader

_COLUMNS = ["time", "kind", "group", "rollout", "attempt", "outcome", "status", "reward", "payload"]
_DECODED = (ev.BatchCommitted, ev.LearnerFenced, ev.HolderDied, ev.Ended)
_LOST = {"outcome": ("evicted", "failed", "filtered"), "status": ("invalid", "timeout")}


class MadeUpdate(NamedTuple):
    """Of the surviving lineage."""

    time: float
    groups: tuple[int, ...]


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(kw_only=True)
class RunDigest:
    """Times in seconds since the epoch. Arrays named together are parallel."""

    began: float = 0.0  # the first event; 0 if there is none
    over: bool = False  # whether the run made its last update
    updates: dict[int, MadeUpdate] = field(default_factory=dict)  # by number
    restarts: list[tuple[float, ev.HolderDied | ev.LearnerFenced]] = field(default_factory=list)
    lost: dict[str, np.ndarray] = field(default_factory=dict)  # when groups were evicted, …, rollouts invalid, …
    scored_groups: np.ndarray = field(default_factory=_none)  # of rollouts with a reward: the group, the place in it,
    scored_rollouts: np.ndarray = field(default_factory=_none)
    rewards: np.ndarray = field(default_factory=_none)
    bad_groups: np.ndarray = field(default_factory=_none)  # with an invalid or late rollout, rising
    submitted: np.ndarray = field(default_factory=_none)  # `rollout_keys`, rising, and
    submitted_at: np.ndarray = field(default_factory=_none)  # how many updates were made when it was submitted
    trained_groups: np.ndarray = field(default_factory=_none)  # rising, and
    trained_by: np.ndarray = field(default_factory=_none)  # the update

    def updates_of(self, groups: np.ndarray) -> np.ndarray:
        """The update that trained each of them; -1: none."""
        return _looked_up(groups, self.trained_groups, self.trained_by)

    def made_before(self, keys: np.ndarray) -> np.ndarray:
        """How many updates were made when each rollout was submitted; -1: it was not."""
        return _looked_up(keys, self.submitted, self.submitted_at)


def rollout_keys(rows: pa.Table) -> np.ndarray:
    """A number for each (group, rollout, attempt)."""
    group, rollout, attempt = (_ints(rows[name]) for name in ("group", "rollout", "attempt"))
    return (group << 24) + (rollout << 8) + np.minimum(attempt, 255)


def digest_events(reader: ReplayReader) -> RunDigest:
    """Reads all events. Raises `DataError`."""
    pieces = reader.pieces("events", _COLUMNS, _Piece)
    digest, made, keys, at = RunDigest(), 0, [], []
    for piece in pieces:
        digest.began = digest.began or piece.began
        changes = [made]
        for when, event in piece.decoded:
            made = _apply(digest, when, event, made)
            changes.append(made)
        keys.append(piece.submitted)
        at.append(np.array(changes, np.int64)[piece.decoded_before])
    digest.lost = {name: _joined([piece.lost[name] for piece in pieces]) for names in _LOST.values() for name in names}
    digest.scored_groups, digest.scored_rollouts = (_joined([piece.scored[i] for piece in pieces]) for i in (0, 1))
    digest.rewards = _joined([piece.rewards for piece in pieces])
    digest.bad_groups = np.unique(_joined([piece.bad for piece in pieces]))
    digest.submitted, digest.submitted_at = _rising(_joined(keys), _joined(at))
    groups = np.array([group for update in digest.updates.values() for group in update.groups], np.int64)
    by = np.repeat(np.array([*digest.updates], np.int64), [len(update.groups) for update in digest.updates.values()])
    digest.trained_groups, digest.trained_by = _rising(groups, by)
    return digest


def _apply(digest: RunDigest, when: float, event: ev.Event, made: int) -> int:
    """Takes an event; how many updates are made after it."""
    if isinstance(event, ev.BatchCommitted):
        digest.updates[event.version.update] = MadeUpdate(event.time, event.groups)
        return event.version.update
    if isinstance(event, ev.LearnerFenced):
        digest.updates = {update: of for update, of in digest.updates.items() if update <= event.committed}
        digest.over = False
        if event.incarnation > 1:
            digest.restarts.append((when, event))
        return event.committed
    if isinstance(event, ev.HolderDied):
        digest.restarts.append((when, event))
    digest.over = digest.over or isinstance(event, ev.Ended)
    return made


class _Piece:
    """Of some events."""

    def __init__(self, events: pa.Table) -> None:
        time, kind = events["time"].to_numpy(), events["kind"]
        self.began = float(time[0]) if len(time) else 0.0
        places = np.flatnonzero(pc.is_in(kind, pa.array([of.__struct_config__.tag for of in _DECODED])).to_numpy())
        payloads = events["payload"].take(places).to_pylist()
        self.decoded = [(float(time[place]), ev.decode(text)) for place, text in zip(places, payloads, strict=True)]
        submitted, scored, keys = _is(kind, "submitted"), _is(kind, "scored"), rollout_keys(events)
        self.submitted = keys[submitted]
        self.decoded_before = np.searchsorted(places, np.flatnonzero(submitted))
        rewarded = scored & events["reward"].is_valid().to_numpy()
        self.scored = [_ints(events[name])[rewarded] for name in ("group", "rollout")]
        self.rewards = events["reward"].to_numpy()[rewarded]
        self.bad = _ints(events["group"])[scored & ~_is(events["status"], "ok")]
        self.lost = {name: time[_is(events[column], name)] for column, names in _LOST.items() for name in names}


def _is(column: pa.ChunkedArray, value: str) -> np.ndarray:
    found: np.ndarray = pc.fill_null(pc.equal(column, value), False).to_numpy()
    return found


def _ints(column: pa.ChunkedArray) -> np.ndarray:
    numbers: np.ndarray = pc.fill_null(column, 0).to_numpy().astype(np.int64)
    return numbers


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """There is at least one: a log ends with an empty piece."""
    return np.concatenate(arrays)


def _rising(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]


def _looked_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: np.ndarray = np.where(keys[at] == wanted, values[at], -1)
    return found
