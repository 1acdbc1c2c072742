"""Held-out evaluation over the same hops: tickets outside admission, pinned to one version; those of episodes are not."""

import logging
from collections.abc import Sequence
from typing import Any

import asyncrl.replay.log.events as ev
from asyncrl.errors import ConfigError
from asyncrl.replay.admission import Holders, ticket
from asyncrl.replay.context import StoreContext
from asyncrl.replay.log.rows import TEXT_COLUMNS, Summary, decode_texts
from asyncrl.replay.state import EvalRound, Group, RolloutState
from asyncrl.report.scores import Metric, Scored, mean_scores
from asyncrl.types import EvalResult, Key, Ticket, Version

log = logging.getLogger(__name__)


class Evaluations:
    """One evaluation runs at a time; one more may wait, and a newer request replaces it.

    The pin moves to a newer version, and partial results are dropped, only when prompts are left to generate and no live
    holder works at the old one.

    Where it is not pinned, anybody with the version asked for or a newer one goes on with it, and the result says how old and
    how new the weights were. It starts over only for a learner that was restored: nothing is mixed with what that undid.
    """

    def __init__(self, context: StoreContext, holders: Holders) -> None:
        self._context = context
        self._ledger = context.ledger
        self._plan = context.plan.evaluation
        self._holders = holders

    def request_eval(self, caller: Key, version: Version) -> None:
        """Idempotent while the evaluation of `version` runs or waits."""
        self._ledger.check_learner(version.incarnation)
        if not self._plan.total:
            raise ConfigError(f"evaluation of version {version} asked for, but there are no eval prompts: set evaluation.files")
        running = self._ledger.round
        if version not in (running.version if running else None, self._ledger.queued):
            self._context.record(ev.EvalRequested(version))

    def tickets(self, k: int, caller: Key, version: Version) -> list[Ticket]:
        """Up to k eval tickets for a caller at exactly the pinned version; or at a newer one, where it is not pinned."""
        running = self._ledger.round
        if running is None or k < 1:
            return []
        if version > running.version and self._left_behind(running, version):
            self._context.record(ev.EvalPinned(version))
            running = self._ledger.round
            assert running is not None
        if version < running.version or (self._plan.pinned and version > running.version):
            return []
        tickets: list[Ticket] = []
        for group in [g for g in self._holders.lost() if g.purpose == "eval"]:
            if len(tickets) < k and self._holders.may_take(group.prompt, caller):
                tickets.append(self._holders.reissue(group, caller, version.update))
        for position in range(len(running.groups), self._plan.total):
            if len(tickets) >= k or not self._holders.may_take(("eval", position), caller):
                break
            tickets += self._reserve(running, position, caller)
        return tickets

    def _reserve(self, running: EvalRound, position: int, caller: Key) -> list[Ticket]:
        """The ticket for one prompt; none for one that was given up, which counts as invalid."""
        group, update = self._ledger.next_group, running.version.update
        reserved = ev.GroupReserved(
            group, "eval", position, 0, self._plan.at(position)[0].n, update, caller.worker, caller.incarnation
        )
        self._context.record(reserved)
        message = self._ledger.given_up.get(running.groups[group].prompt)
        if message is None:
            return [ticket(self._context, running.groups[group])]
        self._context.record(ev.GroupSettled(group, "failed", False, message))
        self.finish_if_complete()
        return []

    def takes(self, row: Summary, running: EvalRound) -> bool:
        """Whether its tokens come from the pinned weights; where there is no pin, from no learner restored since."""
        return row.version == running.version if self._plan.pinned else row.incarnation <= running.version.incarnation

    def finish_if_complete(self) -> None:
        """Records the result once every rollout has a verdict. Rollouts without a reward count as 0."""
        running, metrics = self._ledger.round, self._plan.metrics
        if running is None or running.unscored or not running.groups or len(running.groups) < self._plan.total:
            return
        groups = self._responses(list(running.groups.values()))
        try:
            results = self._results(running.version, groups, metrics)
        except ConfigError as error:  # an evaluation costs no run its life
            log.error("%s; they are left out of this evaluation", error)
            results = self._results(running.version, groups, ())
        self._context.record(ev.Evaluated(results.pop(""), self._context.wall(), results))

    def _responses(self, groups: list[Group]) -> list[list[Scored]]:
        """Of each group; with their texts if metrics look at them."""
        plan = self._plan
        rows = [rollout.row for group in groups for rollout in group.rollouts if rollout.row >= 0 and plan.metrics]
        texts = dict(zip(rows, decode_texts(self._context.log.take(rows, TEXT_COLUMNS)), strict=True)) if rows else {}
        sources = [plan.at(group.position)[1].data_source for group in groups]
        return [
            [_scored(source, rollout, texts.get(rollout.row, {})) for rollout in group.rollouts]
            for group, source in zip(groups, sources, strict=True)
        ]

    def _results(self, version: Version, groups: list[list[Scored]], metrics: Sequence[Metric]) -> dict[str, EvalResult]:
        size = len(self._plan.prompts)
        return {
            setting.name: mean_scores(version, groups[i * size : (i + 1) * size], metrics)
            for i, setting in enumerate(self._plan.settings)
        }

    def _left_behind(self, running: EvalRound, version: Version) -> bool:
        """Whether it is to start over at this newer version."""
        in_flight = [g for g in running.groups.values() if g.in_flight()]
        if not in_flight and len(running.groups) == self._plan.total:
            return False  # only verdicts are missing
        if not self._plan.pinned:
            return not running.groups or version.incarnation > running.version.incarnation
        return all(self._holders.is_lost(g.id) for g in in_flight)


def _scored(source: str, rollout: RolloutState, texts: dict[str, Any]) -> Scored:
    figures = rollout.figures or {}
    if figures.get("tokens"):
        figures = figures | {"oldest_update": rollout.oldest, "newest_update": rollout.newest}
    length = int(figures.get("tokens", rollout.length))
    return Scored(source, rollout.reward, rollout.status, length, figures=figures, **texts)
