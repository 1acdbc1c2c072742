"""A run that another process leads, as that writes it down: the same summary as its leader has, made of metrics.jsonl."""

import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.errors import DiskFull, exit_status
from asyncrl.report.summary import RunEnd, RunSummary
from asyncrl.rundir import RunDir, redact, write_atomic
from asyncrl.types import GroupCounts, Record, Report, StoreReport, Version

_KEPT = 64  # updates with all their metrics; of those before, sums
_NAMED = ("sequence", "time", "kind", "step", "incarnation")


class FollowedRun:
    """`read` takes what was written since; what happened to groups only the leader knows."""

    def __init__(self, paths: RunDir, since: float = 0.0, newest_bytes: int | None = None) -> None:
        """since: when the leader began, in seconds since the epoch; newest_bytes: only so much is read at first."""
        recipe = _json(paths.recipe)
        self.summary = RunSummary(name=paths.path.name, total_steps=recipe.get("total_steps", 0), starting=True)
        self.heard = 0.0  # when the newest line was written, in seconds since the epoch
        self._path, self._since = paths.metrics, since
        size = paths.metrics.stat().st_size if paths.metrics.exists() else 0
        self._at = max(0, size - newest_bytes) if newest_bytes else 0
        self._skip = self._at > 0  # what is left of a line
        self._store = StoreReport(records=(), committed=0, counts=GroupCounts(), evals_pending=0, activity=0, gauges={})

    def read(self) -> RunSummary:
        """Always the same object."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._at)
            *lines, rest = file.read().split(b"\n")
            self._at = file.tell() - len(rest)
            for line in lines[self._skip :]:
                with contextlib.suppress(msgspec.MsgspecError):
                    self._take(msgspec.json.decode(line, type=dict[str, Any]))
            self._skip = self._skip and not lines
        return self.summary

    def _take(self, line: Mapping[str, Any]) -> None:
        run, step = self.summary, int(line["step"])
        self.heard = line["time"]
        run.elapsed_s, run.starting = max(0.0, self.heard - self._since), False
        figures = {name: math.nan if of is None else of for name, of in line.items() if name not in _NAMED}
        records: tuple[Record, ...] = ()
        reports: list[Report] = []
        restarts, committed = run.restarts, step
        if line["kind"] == "actors":
            run.reports.clear()  # some may have left
            reports, restarts = _actors(figures)
            store = next((of for of in reports if of.name == "store"), None)
            if store is not None:
                self._store = msgspec.structs.replace(self._store, seconds=store.seconds, gauges=store.gauges)
        elif line["kind"] in ("step", "eval"):
            version = Version(line["incarnation"], step)
            records = (Record(sequence=line["sequence"], time=self.heard, kind=line["kind"], version=version, metrics=figures),)
            committed = step if line["kind"] == "step" else max(step, run.committed)
        told = msgspec.structs.replace(self._store, records=records, committed=committed, settled=max(0, committed - _KEPT))
        run.update(told, [of for of in reports if of.name != "store"], restarts, {})


def _actors(figures: Mapping[str, float]) -> tuple[list[Report], dict[str, int]]:
    """What each actor said of itself, and how often it was replaced."""
    found: dict[str, Report] = {}
    restarts: dict[str, int] = {}
    for name, value in figures.items():
        actor, _, what = name.partition("/")
        report = found.setdefault(actor, Report(name=actor, role=actor.partition("-")[0], seconds={}, gauges={}))
        if what == "restarts":
            restarts[actor] = int(value)
        elif what.endswith("_s") and not what.endswith("_per_s") and "/" not in what:
            report.seconds[what.removesuffix("_s")] = value
        else:
            report.gauges[what] = value
    return [of for of in found.values() if of.seconds], restarts


def run_end(paths: RunDir) -> RunEnd | None:
    """How the newest start ended; None: it goes on, or nobody was there to say."""
    try:
        return msgspec.json.decode(paths.ended.read_bytes(), type=RunEnd)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def write_end(paths: RunDir, committed: int, error: BaseException | None) -> None:
    """For whoever asks later; a full disk, which was told already, leaves it out."""
    steps, said = paths.steps(), redact(str(error)) if error is not None else ""
    checkpoint = str(steps[-1]) if steps else ""
    end = RunEnd(time=time.time(), status=exit_status(error), steps=committed, checkpoint=checkpoint, error=said)
    with contextlib.suppress(DiskFull, OSError):
        write_atomic(paths.ended, msgspec.json.encode(end) + b"\n")


def newest_error(paths: RunDir) -> str:
    """The last line of the newest `logs/*.error`: of each actor, there is that of its first failure."""
    files = sorted(paths.logs.glob("*.error"), key=lambda path: path.stat().st_mtime)
    if not files:
        return ""
    lines = files[-1].read_text(errors="replace").strip().splitlines()
    return f"{files[-1].stem}: {lines[-1] if lines else ''}"


def _json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, msgspec.MsgspecError):
        return {}
