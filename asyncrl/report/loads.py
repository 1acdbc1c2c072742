"""What actors report, as the loads that `asyncrl.autoscale` decides by: of a run, and of a simulated one. Pure."""

from collections.abc import Mapping
from statistics import fmean

from asyncrl.autoscale import Load
from asyncrl.report.timing import time_shares
from asyncrl.types import Report


class LoadMeter:
    """Loads since `restart`; `sample` is called some times a minute at least. reports: the newest of each actor, by name."""

    def __init__(self) -> None:
        self._before: dict[str, Report] = {}
        self._used: list[float] = []  # share of the engines' slots that are taken, by sample

    def restart(self, reports: Mapping[str, Report]) -> None:
        self._before, self._used = dict(reports), []

    def sample(self, reports: Mapping[str, Report]) -> None:
        gauges = [report.gauges for report in reports.values() if report.role == "generator"]
        if gauges:
            self._used.append(fmean(each["active_slots"] / max(1.0, each["slots"]) for each in gauges))

    def load(self, role: str, reports: Mapping[str, Report]) -> Load:
        """Of generators or reward workers."""
        shares = {name: self._shares(report) for name, report in reports.items()}
        limits = self._limits(reports)
        waits = shares.get("learner", {}).get("wait:store", 0.0)
        if role == "generator":
            held = limits["max_lag"] + limits["reserve_ahead"]
            return Load(short=max(0.0, waits - limits["stragglers"]), held=held, used=fmean(self._used or [0.0]))
        waiting = [shares[name] for name, report in reports.items() if report.role == role]
        # More workers make no model faster that they ask.
        held = fmean([share.get("wait:store", 0.0) + share.get("wait:models", 0.0) for share in waiting] or [0.0])
        return Load(short=max(0.0, waits - limits["stragglers"]) if held < 0.1 else 0.0, held=held, used=1.0 - held)

    def _shares(self, report: Report) -> dict[str, float]:
        before = self._before.get(report.name)
        return time_shares(before.seconds if before is not None else {}, report.seconds)

    def _limits(self, reports: Mapping[str, Report]) -> dict[str, float]:
        """Shares of the store's time, of which its gauges tell those since it was started."""
        now, before = reports["store"], self._before.get("store")
        end, begin = sum(now.seconds.values()), sum(before.seconds.values()) if before is not None else 0.0
        found = {}
        for name in ("max_lag", "reserve_ahead", "stragglers"):
            then = before.gauges[f"limit/{name}"] * begin if before is not None and begin <= end else 0.0
            found[name] = max(0.0, now.gauges[f"limit/{name}"] * end - then) / max(1e-9, end - (begin if begin <= end else 0))
        return found
