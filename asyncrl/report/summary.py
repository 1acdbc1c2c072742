"""What a run has come to so far: the store's records summed up, and every figure written down as it arrives."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from asyncrl.report.metrics_log import MetricsLog
from asyncrl.rundir import RunDir
from asyncrl.types import GroupCounts, Record, Report

if TYPE_CHECKING:
    from asyncrl.types import RunStatus

ACTORS_EVERY_S = 5.0


class RunSummary:
    """Sums over the surviving lineage: a step that a restore reopened counts once, as it was trained last."""

    def __init__(self, paths: RunDir, observe: "Callable[[RunStatus, RunSummary], None] | None") -> None:
        self._log = MetricsLog(paths.metrics, paths.tensorboard)
        self._observe = observe
        self._steps: dict[int, Record] = {}
        self._evals: dict[int, Record] = {}
        self._actors_due = time.monotonic()
        self._reports: dict[str, Report] = {}
        self._lengths = (0.0, 0.0)  # mean answer lengths: of all that were submitted, of those trained
        self.committed = 0
        self.counts = GroupCounts(reserved=0, trained=0, filtered=0, evicted=0, failed=0, pending=0)

    def observe(self, status: "RunStatus") -> None:
        """Takes what the supervisor learnt in one tick."""
        self._reports |= {report.name: report for report in status.reports}
        if status.store is not None:
            for record in status.store.records:
                self._take(record)
            self.committed, self.counts = status.store.committed, status.store.counts
            # A learner that was restored to an earlier update has given up what came after it.
            self._steps = {update: record for update, record in self._steps.items() if update <= self.committed}
            self._evals = {update: record for update, record in self._evals.items() if update <= self.committed}
            gauges = status.store.gauges
            self._lengths = gauges.get("length/dispatched_mean", 0.0), gauges.get("length/trained_mean", 0.0)
        if time.monotonic() >= self._actors_due:
            self._write_actors()
        if self._observe is not None:
            self._observe(status, self)

    def close(self) -> None:
        self._write_actors()
        self._log.close()

    @property
    def latest(self) -> dict[str, float]:
        """Metrics of the newest update."""
        return self._steps[max(self._steps)].metrics if self._steps else {}

    @property
    def scores(self) -> tuple[float, ...]:
        """Held-out scores, by update."""
        return tuple(self._evals[update].metrics["eval/score"] for update in sorted(self._evals))

    @property
    def first_score(self) -> float | None:
        return self.scores[0] if self._evals else None

    @property
    def last_score(self) -> float | None:
        return self.scores[-1] if self._evals else None

    @property
    def samples(self) -> int:
        """Rollouts trained."""
        return int(self._sum("samples"))

    @property
    def max_trained_lag(self) -> int:
        return int(max((step.metrics.get("staleness/lag_max", 0) for step in self._steps.values()), default=0))

    @property
    def masked_share(self) -> float:
        """Policy tokens that were leased but too old to train, over all that were leased."""
        policy = self._sum("tokens/policy")
        return 1.0 - self._sum("tokens/trained") / policy if policy else 0.0

    @property
    def trained_length_ratio(self) -> float | None:
        """Mean length of trained over dispatched answers; below 1, staleness favoured short ones."""
        dispatched, trained = self._lengths
        return trained / dispatched if dispatched and trained else None

    @property
    def learner_utilization(self) -> float:
        """Share of the learner's own wall clock, from its first batch on, in which it computed."""
        seconds = self._reports["learner"].seconds if "learner" in self._reports else {}
        total = sum(value for state, value in seconds.items() if state != "wait:start")
        return seconds.get("busy", 0.0) / total if total else 0.0

    def _take(self, record: Record) -> None:
        self._log.append(record)
        update = record.version.update
        if record.kind == "eval":
            self._evals[update] = record
        else:
            self._steps[update] = record

    def _sum(self, name: str) -> float:
        return sum(step.metrics.get(name, 0.0) for step in self._steps.values())

    def _write_actors(self) -> None:
        if self._reports:
            self._log.append_actors(time.time(), self.committed, self._reports.values())
        self._actors_due = time.monotonic() + ACTORS_EVERY_S
