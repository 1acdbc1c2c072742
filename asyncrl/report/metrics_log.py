"""metrics.jsonl: written here only, by the driver, who passes the same on to trackers. Imports no torch.

One line per record, flat, so that `pandas.read_json(path, lines=True)` gives a table:
`{"sequence": 7, "time": …, "kind": "step", "step": 7, "incarnation": 0, "reward/mean": 0.5, …}`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from asyncrl.disk import naming_full_disk
from asyncrl.errors import DataError
from asyncrl.report.summary import Scaling
from asyncrl.report.timing import time_shares
from asyncrl.report.trackers import Trackers
from asyncrl.types import Record, Report


class MetricsLog:
    """Appends records; a record whose sequence number was written before, also by an earlier process, is ignored.

    One writer at a time: the holder of the run directory's lock. A line that a kill cut short is removed at the start.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file = path.open("r+b")
        self.last_sequence = _recover(self._file, path)  # of the newest record in the file; 0 if there is none
        self._path, self._trackers = path, trackers
        self._seconds: dict[str, Mapping[str, float]] = {}  # of each actor, as it was told last

    def append(self, record: Record) -> bool:
        """Writes one record; False if it was there already. The operating system has it then. Raises DiskFull."""
        if record.sequence <= self.last_sequence:
            return False
        head = {"sequence": record.sequence, "time": record.time, "kind": record.kind}
        head |= {"step": record.version.update, "incarnation": record.version.incarnation}
        self._write({**head, **record.metrics})
        self._track(record.metrics, record.version.update, record.time)
        self.last_sequence = record.sequence
        return True

    def append_actors(
        self, time: float, step: int, reports: Iterable[Report], restarts: Mapping[str, int] | None = None
    ) -> None:
        """One line of kind `actors`: `<actor>/<state>_s`, seconds since that actor started, `<actor>/<gauge>`, and
        `<actor>/restarts`, of those that had any.

        Trackers get `actors/<actor>/<state>` instead of the seconds: the share of the time since the line before. Raises
        DiskFull.
        """
        line: dict[str, float] = {f"{name}/restarts": count for name, count in (restarts or {}).items()}
        scalars: dict[str, float] = {}
        for report in reports:
            line |= {f"{report.name}/{state}_s": seconds for state, seconds in report.seconds.items()}
            line |= {f"{report.name}/{gauge}": value for gauge, value in report.gauges.items()}
            figures = time_shares(self._seconds.get(report.name, {}), report.seconds) | report.gauges
            scalars |= {f"actors/{report.name}/{name}": value for name, value in figures.items()}
            self._seconds[report.name] = report.seconds
        self._write({"time": time, "kind": "actors", "step": step, **line})
        self._track(scalars, step, time)

    def append_scaling(self, scaling: Scaling) -> None:
        """One line of kind `scale`. Raises DiskFull."""
        self._write({"kind": "scale", **structs.asdict(scaling)})

    def close(self) -> None:
        """Idempotent. What could not be written was told when it was."""
        with suppress(OSError):
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()

    def _track(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        if self._trackers is not None:
            self._trackers.log(metrics, step, time)

    def _write(self, line: dict[str, Any]) -> None:
        with naming_full_disk(self._path):
            self._file.write(msgspec.json.encode(line) + b"\n")  # a NaN becomes null: the line stays JSON
            self._file.flush()


def _recover(file: BufferedRandom, path: Path) -> int:
    """Cuts a torn last line off, leaves the file at its end, and returns the newest sequence number in it."""
    newest = good = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            newest = max(newest, json.loads(line).get("sequence", 0))
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}): metrics can't be continued; move it away") from error
        good += len(line)
    file.seek(good)
    os.ftruncate(file.fileno(), good)
    return newest
