"""A run's figures on Ray's Prometheus endpoint, beside Ray's own: a tracker of the driver's."""

from collections.abc import Mapping

from ray.util.metrics import Gauge

from asyncrl.report.names import described, prometheus_name
from asyncrl.report.trackers import RunFacts

AGAIN_S = 5.0  # Ray forgets a gauge that was not set for some 20 s: the last evaluation is to stay


class RayGauges:
    """Sets a gauge for each metric, labelled with the run. The node's metrics agent is told of it every few seconds."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}  # of each metric, the newest
        self._all_set = 0.0  # when they were all set, in seconds since the epoch

    def start(self, facts: RunFacts) -> None:
        self._run = {"run": facts.name}

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        new = {**metrics, "update": step}
        self._values |= new
        if time - self._all_set >= AGAIN_S:
            new, self._all_set = self._values, time
        for metric, value in new.items():
            name, labels = prometheus_name(metric)
            if name not in self._gauges:
                known = described(metric)
                said = f"{known.row.meaning} ({known.row.unit})" if known is not None else metric
                said = said.encode("ascii", "xmlcharrefreplace").decode()  # all that Ray takes
                self._gauges[name] = Gauge(name, said, tag_keys=("run", *labels))
            self._gauges[name].set(float(value), self._run | labels)

    def close(self) -> None:
        """They are gone with the process."""
