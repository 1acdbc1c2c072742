"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Prometheus, or what a user brings.

    driver ─► Trackers.log ─► a bounded queue for each ─► its own thread ─► Tracker.log
The driver alone writes, and waits for nobody: what raises is told once, what hangs loses lines. metrics.jsonl has them all.
"""

import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from asyncrl.config.callables import check_callable, describe, load_callable
from asyncrl.errors import ConfigError
from asyncrl.rundir import redact

log = logging.getLogger(__name__)
QUEUED = 10_000  # lines that wait for a tracker, at most
CLOSE_S = 15.0  # in which all of them together may write what is left when a run ends

# By name: where it is, the package that it needs, and the extra that brings it.
TRACKERS = {
    "tensorboard": ("asyncrl.report.tensorboard:TensorBoard", "tensorboard", ""),
    "wandb": ("asyncrl.report.wandb_runs:WandB", "wandb", "wandb"),
    "mlflow": ("asyncrl.report.mlflow_runs:MLflow", "mlflow", "mlflow"),
}


class RunFacts(Struct, frozen=True, kw_only=True):
    """What a tracker is told of a run as it starts. Secrets are masked."""

    name: str
    run_dir: str  # where a tracker may keep what it needs when the run is resumed: in `trackers/`
    resumed: bool = False
    recipe: dict[str, Any] = {}
    deployment: dict[str, Any] = {}

    @classmethod
    def of(cls, name: str, run_dir: str, resumed: bool, recipe: Struct, deployment: Struct | None = None) -> "RunFacts":
        told = redact(deployment) if deployment is not None else {}
        return cls(name=name, run_dir=run_dir, resumed=resumed, recipe=redact(recipe), deployment=told)


class Tracker(Protocol):
    """Takes a run's figures. Made and called in one thread of the driver's, one call after the other; it may block."""

    def start(self, facts: RunFacts) -> None:
        """Before the first `log`."""

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        """The figures of an update, an evaluation or the actors. step: updates committed; an evaluation comes after updates
        that are newer, and what a resumed run makes again comes again. time: seconds since the epoch."""

    def close(self) -> None:
        """After the last `log`."""


class _Line(NamedTuple):
    metrics: Mapping[str, float]
    step: int
    time: float


class Trackers:
    """Passes lines on to trackers, each in a thread of its own. `log` never waits; `close` waits CLOSE_S at most."""

    def __init__(
        self, names: Sequence[str], facts: RunFacts, others: Mapping[str, Callable[[], Tracker]] | None = None
    ) -> None:
        """names: those of TRACKERS, or of the user's own classes. others: made by who calls, by name."""
        made = {name: _factory(name) for name in names} | dict(others or {})
        self._threads = [_TrackerThread(name, make, facts) for name, make in made.items()]

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        line = _Line(metrics, step, time)
        for thread in self._threads:
            thread.put(line)

    def close(self) -> None:
        """Idempotent. A tracker that takes longer is left to itself, and ends with the process."""
        deadline = time.monotonic() + CLOSE_S
        waiting = [thread for thread in self._threads if not thread.put(None)]
        for thread in waiting:
            thread.put(None, deadline)
        for thread in self._threads:
            thread.join(deadline)
        self._threads = []


def check_tracker(name: str) -> None:
    """Raises ConfigError for one that is not installed, or that the user's source does not have."""
    if name not in TRACKERS:
        if ":" not in name and "." not in name:
            raise ConfigError(
                f"trackers={name!r} is none of {', '.join(TRACKERS)}; a class of your own is named package.module:Name"
            )
        check_callable(name, "trackers")
        return
    _, package, extra = TRACKERS[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"trackers={name!r} needs the package {package}: pip install 'asyncrl[{extra}]'")


def _factory(name: str) -> Callable[[], Tracker]:
    return lambda: load_callable(TRACKERS[name][0] if name in TRACKERS else name, "trackers")()


class _TrackerThread:
    """One tracker: made, called and closed in a daemon thread."""

    def __init__(self, name: str, make: Callable[[], Tracker], facts: RunFacts) -> None:
        self._name, self._make, self._facts = name, make, facts
        self._lines: queue.Queue[_Line | None] = queue.Queue(QUEUED)
        self._lost = 0  # lines that found the queue full
        self._told = False  # of its first error
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, line: _Line | None, until: float = 0.0) -> bool:
        """Hands on a line, or None: the end; False if it could not. Waits for room until then at most; a thread that has ended
        takes nothing."""
        if not self._thread.is_alive():
            return line is None
        try:
            self._lines.put(line, timeout=max(1e-9, until - time.monotonic()))
        except queue.Full:
            self._lost += line is not None
            if self._lost == 1 and self._thread.is_alive():
                log.warning("tracker %s does not keep up: lines are left out there; metrics.jsonl has them", self._name)
            return False
        return True

    def join(self, deadline: float) -> None:
        """Waits until the end is reached, or the deadline."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            left = self._lost + self._lines.qsize()
            log.warning("tracker %s has not ended after %g s: up to %d lines are missing there", self._name, CLOSE_S, left)

    def _run(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._make()
            tracker.start(self._facts)
            while (line := self._lines.get()) is not None:
                self._guarded(tracker.log, *line)
        except Exception as error:
            self._tell(error, "it could not start, and is left out")
        if tracker is not None:
            self._guarded(tracker.close)

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self._tell(error, "it is asked again with the next line; later errors are not told")

    def _tell(self, error: Exception, after: str) -> None:
        if not self._told:
            log.warning("tracker %s: %s: %s", self._name, redact(describe(error)), after)
        self._told = True
