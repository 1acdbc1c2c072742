"""metrics.jsonl and TensorBoard: written here only, by the driver. Imports no torch.

One line per record, flat, so that `pandas.read_json(path, lines=True)` gives a table:
`{"sequence": 7, "time": …, "kind": "step", "step": 7, "incarnation": 0, "reward/mean": 0.5, …}`.
"""

import json
import os
from collections.abc import Iterable
from io import BufferedRandom
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.errors import DataError
from asyncrl.types import Record, Report


class MetricsLog:
    """Appends records; a record whose sequence number was written before, also by an earlier process, is ignored.

    One writer at a time: the holder of the run directory's lock. A line that a kill cut short is removed at the start.
    """

    def __init__(self, path: Path, tensorboard: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file = path.open("r+b")
        self.last_sequence = _recover(self._file, path)  # of the newest record in the file; 0 if there is none
        self._tensorboard_dir = tensorboard
        self._tensorboard: Any = None

    def append(self, record: Record) -> bool:
        """Writes one record; False if it was there already. Handed to the operating system when this returns."""
        if record.sequence <= self.last_sequence:
            return False
        head = {"sequence": record.sequence, "time": record.time, "kind": record.kind}
        head |= {"step": record.version.update, "incarnation": record.version.incarnation}
        self._write({**head, **record.metrics})
        self._scalars(record.metrics, record.version.update, record.time)
        self.last_sequence = record.sequence
        return True

    def append_actors(self, time: float, step: int, reports: Iterable[Report]) -> None:
        """One line of kind `actors`: `<actor>/<state>_s`, seconds since that actor started, and `<actor>/<gauge>`."""
        figures = {f"{report.name}/{state}_s": seconds for report in reports for state, seconds in report.seconds.items()}
        figures |= {f"{report.name}/{gauge}": value for report in reports for gauge, value in report.gauges.items()}
        self._write({"time": time, "kind": "actors", "step": step, **figures})
        self._scalars({f"actors/{name}": value for name, value in figures.items()}, step, time)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")  # a NaN becomes null: the line stays JSON
        self._file.flush()

    def _scalars(self, figures: dict[str, float], step: int, time: float) -> None:
        if self._tensorboard is None:
            # Here, as it takes 0.2 s to import. torch's own writer would import torch.
            from tensorboard.summary import Writer  # type: ignore[import-untyped]

            self._tensorboard = Writer(str(self._tensorboard_dir))
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, step, wall_time=time)
        self._tensorboard.flush()


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
