"""MLflow (extra `[mlflow]`): a run there for a run here, also when it is resumed.

As MLflow has it, the environment says where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (by itself `asyncrl`).
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from asyncrl.report.trackers import RunFacts
from asyncrl.rundir import RunDir, write_atomic


class MLflow:
    """Sends figures, recipe and deployment. Characters that its names can't have become `_`."""

    def start(self, facts: RunFacts) -> None:
        from mlflow import MlflowClient

        self._client = client = MlflowClient()
        mark = RunDir(facts.run_dir).trackers / "mlflow.id"  # of its run there
        if mark.is_file():
            self._run = mark.read_text()
            client.update_run(self._run, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "asyncrl"
        known = client.get_experiment_by_name(experiment)
        at = known.experiment_id if known is not None else client.create_experiment(experiment)
        self._run = client.create_run(at, run_name=facts.name).info.run_id
        write_atomic(mark, self._run)
        for name, value in _leaves({"recipe": facts.recipe, "deployment": facts.deployment}):
            client.log_param(self._run, _plain(name), str(value)[:500])

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        from mlflow.entities import Metric

        at_ms = int(1000 * time)
        found = [Metric(_plain(name), value, at_ms, step) for name, value in metrics.items() if math.isfinite(value)]
        for first in range(0, len(found), 1000):  # as many as it takes at once
            self._client.log_batch(self._run, metrics=found[first : first + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)
