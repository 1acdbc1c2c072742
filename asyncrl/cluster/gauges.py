"""A run's figures on Ray's Prometheus endpoint, beside Ray's own: a tracker of the driver's."""

from collections.abc import Mapping

from ray.util.metrics import Gauge

from asyncrl.report.names import described, prometheus_name
from asyncrl.report.trackers import RunFacts


class RayGauges:
    """Sets a gauge for each metric, labelled with the run. The node's metrics agent is told of it every few seconds."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def start(self, facts: RunFacts) -> None:
        self._run = {"run": facts.name}

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        for metric, value in {**metrics, "update": step}.items():
            name, labels = prometheus_name(metric)
            if name not in self._gauges:
                known = described(metric)
                said = f"{known.row.meaning} ({known.row.unit})" if known is not None else metric
                said = said.encode("ascii", "xmlcharrefreplace").decode()  # all that Ray takes
                self._gauges[name] = Gauge(name, said, tag_keys=("run", *labels))
            self._gauges[name].set(float(value), self._run | labels)

    def close(self) -> None:
        """They are gone with the process."""
