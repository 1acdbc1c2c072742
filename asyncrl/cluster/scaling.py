"""How many generators, reward workers and ranks of its learner a run should have: as it was told, or by the rule of
`asyncrl.autoscale`."""

import logging
import time

from asyncrl.autoscale import Autoscaler, Decision
from asyncrl.cluster.fleet import Fleet
from asyncrl.cluster.watchdog import Clock
from asyncrl.report.loads import LoadMeter
from asyncrl.report.summary import RunSummary, Scaling, actors_of

log = logging.getLogger(__name__)


class Scaler:
    """Changes how many there should be: to what was stated, and for roles that are elastic to what the rule decides."""

    def __init__(self, fleet: Fleet, every_s: float, clock: Clock) -> None:
        self._fleet = fleet
        self._rules = {role: Autoscaler(span.min, span.max, every_s, clock) for role, span in fleet.elastic.items()}
        self._meters = {role: LoadMeter() for role in fleet.elastic}

    def look(self, summary: RunSummary) -> None:
        """What is due in this round; each decision is logged, and added to `summary.scalings`."""
        for role, count, why in self._fleet.asked():
            self._change(summary, role, Decision(count, why))
        for role in self._fleet.elastic:
            decision = self._decision(role, summary) if {"learner", "store"} <= summary.reports.keys() else None
            if decision is not None:
                self._change(summary, role, decision)

    def _decision(self, role: str, summary: RunSummary) -> Decision | None:
        rule, meter = self._rules[role], self._meters[role]
        now = self._fleet.at_work(role), self._fleet.counts[role], summary.committed
        meter.sample(summary.reports)
        if rule.begins(*now):
            meter.restart(summary.reports)
        elif rule.due(summary.committed):
            decision = rule.decide(*now, meter.load(role, summary.reports))
            meter.restart(summary.reports)
            return decision
        return None

    def _change(self, summary: RunSummary, role: str, decision: Decision) -> None:
        before, self._fleet.counts[role] = self._fleet.counts[role], decision.number
        log.info("%s: %d instead of %d: %s", actors_of(role), decision.number, before, decision.reason)
        summary.scalings.append(
            Scaling(
                time=time.time(),
                step=summary.committed,
                role=role,
                count_before=before,
                count=decision.number,
                reason=decision.reason,
            )
        )
