"""Rewards that fail: how often, how, and whether the reward function works at all."""

import math
import re
from collections import Counter

from asyncrl.errors import ConfigError
from asyncrl.replay.admission import prompt_of
from asyncrl.replay.context import StoreContext
from asyncrl.replay.state import Group
from asyncrl.types import RewardFailures, Score, Status

_FEW, _PATIENCE_S = 16, 60.0  # after a minute of nothing but failures so many suffice: each may have cost a deadline
_ALONE_S = 10.0  # a supervisor ends a run long before; who leads the stages by hand is told then
_KINDS, _SHOWN = 64, 3  # of errors: told apart at the most, and reported
_VARIES = re.compile(r"""'[^']*'|"[^"]*"|\d+(?:\.\d+)?""")  # what differs between two errors of a kind


class FailureWatch:
    """Counts what the reward function failed on, and notices a function that is broken: all of its first scores are failures.

    So many are the first: `sampling.max_first_failures`, or else a batch's worth; all there are, if the data ends before. Once
    so many have failed or are under way, nothing more is generated until one of them has a reward. With the first reward all
    this is over: one that fails later, as when a judge's service is down, ends a run only by `sampling.max_empty_batches`.

    Volatile: a resumed run, and a store that was restarted, watch their own first scores.
    """

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._works = False  # a sample had a reward
        self._failed: Counter[Status] = Counter()
        self._since = 0.0  # when the first failed, on the clock of the context
        self._broken_at = math.inf  # when it was noticed
        self._first = ""
        self._errors: dict[str, tuple[int, str]] = {}  # by kind: how many, and the first of them

    def note(self, group: Group, score: Score) -> None:
        """Takes a verdict that counts."""
        if score.status == "ok":
            if not self._works:
                self._context.stir("tickets")  # which `pauses` may have held back
            self._works = True
            return
        if not self._failed:
            held_out, row = "held-out " * (group.purpose == "eval"), prompt_of(self._context, group).row
            where = f"group {group.id}, rollout {score.rollout}, {held_out}row {row} of the data"
            self._first = f"{self._context.plan.reward} failed on its first sample ({where}): {score.status}: {score.error}"
            self._since = self._context.clock()
        self._failed[score.status] += 1
        kind = _VARIES.sub("…", score.error)
        count, example = self._errors.pop(kind, (0, score.error))
        if len(self._errors) == _KINDS:
            del self._errors[min(self._errors, key=lambda kind: self._errors[kind][0])]
        self._errors[kind] = count + 1, example

    def report(self) -> RewardFailures:
        """All of it, with the most frequent errors."""
        invalid, timeout = self._failed["invalid"], self._failed["timeout"]
        errors = {example: count for count, example in self._most()}
        return RewardFailures(invalid=invalid, timeout=timeout, first=self._first, errors=errors, broken=self._broken())

    def _most(self) -> list[tuple[int, str]]:
        return sorted(self._errors.values(), reverse=True, key=lambda error: error[0])[:_SHOWN]

    def pauses(self) -> bool:
        """Whether only failures have come, and what is under way suffices to tell what that means."""
        if self._works or not self._failed:
            return False
        return self._failed.total() + self._under_way() >= self._enough()

    def check(self) -> None:
        """Raises ConfigError if the function is broken and nobody has ended the run for it: the learner would wait for ever."""
        if broken := self._broken():
            self._broken_at = min(self._broken_at, self._context.clock())
            if self._context.clock() - self._broken_at >= _ALONE_S:
                raise ConfigError(broken)

    def _broken(self) -> str:
        """What is to be said of a reward function that is broken; empty, as long as it may not be."""
        if self._works or not self._failed:  # most often, and asked at every change of the store
            return ""
        failed = self._failed.total()
        over = self._context.exhausted() and not self._under_way() and not self._worked_before()  # all there is to score
        if failed < self._enough() and not over:
            return ""
        errors = "; ".join(f"{count} × {error}" for count, error in self._most())
        several = f" ({errors})" if len(self._errors) > 1 else ""
        return (
            f"{self._first}; none of the first {failed} samples has a reward{several}: there is nothing to train on; fix the "
            "function or, if so many may fail before the first that does not, raise sampling.max_first_failures"
        )

    def _worked_before(self) -> bool:
        """Whether there are rewards that a store before this one took."""
        ledger = self._context.ledger
        return bool(ledger.ready or ledger.taken or ledger.outcomes["trained"] or ledger.outcomes["filtered"])

    def _under_way(self) -> int:
        """Samples that have no verdict yet."""
        return sum(group.unscored for group in self._context.ledger.outstanding())

    def _enough(self) -> int:
        plan = self._context.plan
        if plan.sampling.max_first_failures is not None:
            return plan.sampling.max_first_failures
        if self._context.clock() - self._since >= _PATIENCE_S:
            return _FEW
        return max(_FEW, plan.rule.batch_groups * plan.sampling.n)
