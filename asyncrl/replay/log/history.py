"""What a run trained, batch by batch, from its log alone: for whoever goes back in time. Writes nothing.

    history = open_history("runs/arithmetic")
    for update, commit in history.commits.items():
        rollouts = history.rollouts(commit.groups)    # as the learner got them: in its order, with their scores

Commits are those of the surviving lineage: what a restore undid and trained again is there once, as it was trained last.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

import asyncrl.replay.log.events as ev
from asyncrl.errors import DataError
from asyncrl.replay.log.reader import Listed, ReplayReader, as_columns, at_rest, replay_folder
from asyncrl.replay.log.rows import ROWS, ROWS_3, TRAIN_COLUMNS, TrainScore, decode_train
from asyncrl.replay.log.segments import open_closed, readable
from asyncrl.replay.log.tail import read_tail
from asyncrl.replay.state import Group, RolloutState
from asyncrl.types import TrainRollout

_READ = (ev.GroupReserved, ev.RolloutSubmitted, ev.RolloutScored, ev.BatchCommitted, ev.LearnerFenced, ev.SegmentClosed)


class RunHistory:
    """The log as it stood when this was made. Memory: an object for each rollout, none per token."""

    def __init__(self, folder: Path) -> None:
        self.commits: dict[int, ev.BatchCommitted] = {}  # by update, rising
        self.groups: dict[int, Group] = {}  # those for training
        self._rows = NumberedRows(folder)
        read = ReplayReader(folder).events(["seq", "payload"], [str(kind.__struct_config__.tag) for kind in _READ])
        self.events = 1 + (read["seq"][-1].as_py() if len(read) else -1)  # of the log, that this is made of
        for batch in read.to_batches():
            for event in map(ev.decode, batch["payload"].to_pylist()):
                self._take(event)

    def rollouts(self, groups: Sequence[int]) -> list[TrainRollout]:
        """The sampled rollouts of these groups that have a reward, group after group. Raises `DataError` for rows that were
        deleted, as store.keep_bytes says."""
        found: list[tuple[int, TrainScore]] = []
        for group in (self.groups[g] for g in groups):
            greedy = group.baseline()
            earned = None if greedy is None else greedy.earned
            found += [(r.row, TrainScore(r.reward, r.parts, earned)) for r in group.ok()]
        rows = self._rows.take([row for row, _ in found], TRAIN_COLUMNS)
        return decode_train(rows, [score for _, score in found])

    def rows(self, groups: Iterable[int], columns: Sequence[str]) -> pa.RecordBatch:
        """These columns (of rows.ROWS) of all rollouts of the groups that were submitted, baselines included, group after
        group. Raises as `rollouts`."""
        return self._rows.take([r.row for g in groups for r in self.groups[g].rollouts if r.row >= 0], list(columns))

    def holds(self, groups: Iterable[int]) -> bool:
        """Whether all rows of these groups are still there."""
        return self._rows.hold([r.row for g in groups for r in self.groups[g].rollouts if r.row >= 0])

    def _take(self, e: ev.Event) -> None:
        if isinstance(e, ev.GroupReserved) and e.purpose == "train":
            size = e.n + e.baseline
            rollouts = [RolloutState() for _ in range(size)]
            self.groups[e.group] = Group(
                e.group, e.purpose, e.position, e.retry, 0, e.update, e.worker, e.incarnation, rollouts, e.n, size, size
            )
        elif isinstance(e, ev.RolloutSubmitted) and e.group in self.groups:
            r = self.groups[e.group].rollouts[e.rollout]
            r.row, r.attempt, r.oldest, r.newest, r.length = e.row, e.attempt, e.oldest, e.newest, e.length
            r.figures = e.figures
        elif isinstance(e, ev.RolloutScored) and e.group in self.groups:
            r = self.groups[e.group].rollouts[e.rollout]
            r.status, r.reward, r.parts = e.status, 0.0 if e.reward is None else e.reward, e.parts
            if e.row is not None:
                r.row, r.token_sum = e.row, e.token_sum
        elif isinstance(e, ev.BatchCommitted):
            self.commits[e.version.update] = e
        elif isinstance(e, ev.LearnerFenced):
            self.commits = {update: commit for update, commit in self.commits.items() if update <= e.committed}
        elif isinstance(e, ev.SegmentClosed) and e.stream == "rows":
            self._rows.known[e.number] = e


class NumberedRows:
    """The rows of a log by their numbers, closed segments and tails, also while these are written.

    known: what the event log says of closed segments, by number; files of some of them may have been deleted.
    """

    def __init__(self, folder: Path) -> None:
        self.known: dict[int, ev.SegmentClosed] = {}
        self._folder = folder

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> pa.RecordBatch:
        """The rows with these numbers, in this order. Raises `DataError` if one of them is not there."""
        wanted, numbers = pa.schema([ROWS.field(name) for name in columns]), np.array(rows, np.int64)

        def read(closed: Listed, tails: Listed) -> pa.Table:
            parts, places = [wanted.empty_table()], [np.empty(0, np.int64)]
            for first, count, path in self._segments(closed, tails):
                (own,) = np.nonzero((numbers >= first) & (numbers < first + count))
                if len(own):
                    parts.append(as_columns(wanted, _taken(path, numbers[own] - first, wanted.names)))
                    places.append(own)
            found = np.concatenate(places)
            if len(found) < len(numbers):
                gone = np.setdiff1d(np.arange(len(numbers)), found)
                raise DataError(
                    f"{self._folder}/rows: row {numbers[gone[0]]} and {len(gone) - 1} others of {len(numbers)} are deleted: a "
                    "log keeps store.keep_bytes of what no checkpoint needs; name a later update, or raise it in the next run"
                )
            return pa.concat_tables(parts).take(np.argsort(found))

        (batch,) = at_rest(self._folder, "rows", read).combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], wanted)]
        return batch

    def hold(self, rows: Sequence[int]) -> bool:
        """Whether all rows with these numbers are there."""

        def missing(closed: Listed, tails: Listed) -> bool:
            left = np.array(rows, np.int64)
            for first, count, _ in self._segments(closed, tails):
                left = left[(left < first) | (left >= first + count)]
            return bool(len(left))

        return not at_rest(self._folder, "rows", missing)

    def _segments(self, closed: Listed, tails: Listed) -> Iterator[tuple[int, int, Path]]:
        """(number of the first row, rows, path) of what is there. What was closed since `known` follows the others."""
        end = 0
        for number, path in [*closed, *tails]:
            segment = self.known.get(number)
            first = end if segment is None else segment.first
            count = segment.count if segment is not None else _count(path)
            end = first + count
            yield first, count, path


def _count(path: Path) -> int:
    """Rows of a closed segment or a tail."""
    if path.suffix == ".tail":
        return sum(batch.num_rows for batch in read_tail(path, ROWS, ROWS_3))
    return int(open_closed(path, ROWS, ROWS_3).metadata.num_rows)


def _taken(path: Path, places: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """These rows of a segment, by their places in it; of a closed one only the chunks that hold them are read."""
    if path.suffix == ".tail":
        return pa.Table.from_batches(read_tail(path, ROWS, ROWS_3)).take(places)
    file = open_closed(path, ROWS, ROWS_3)
    size = file.metadata.row_group(0).num_rows
    chunks, among = np.unique(places // size, return_inverse=True)
    with readable(path):
        table = file.read_row_groups(chunks.tolist(), [name for name in columns if name in file.schema_arrow.names])
    return table.take(among * size + places % size)


def open_history(run_dir: str | Path) -> RunHistory:
    """What the log of a run directory says so far. Raises `DataError` if there is none, or it is damaged."""
    return RunHistory(replay_folder(run_dir))
