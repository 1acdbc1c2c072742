"""What the log of a run that was disturbed must show."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from asyncrl import RunResult
from asyncrl.replay.log import events as ev


@pytest.fixture(scope="session")
def surviving_commits() -> Callable[[Sequence[Any]], list[ev.BatchCommitted]]:
    """The commits that the last learner's lineage stands on, in order."""

    def surviving(events: Sequence[Any]) -> list[ev.BatchCommitted]:
        lineage: list[ev.BatchCommitted] = []
        for event in events:
            if isinstance(event, ev.LearnerFenced):
                lineage = [commit for commit in lineage if commit.version.update <= event.committed]
            elif isinstance(event, ev.BatchCommitted):
                lineage.append(event)
        return lineage

    return surviving


@pytest.fixture(scope="session")
def assert_nothing_lost(
    surviving_commits: Callable[[Sequence[Any]], list[ev.BatchCommitted]],
) -> Callable[[Sequence[Any], RunResult], None]:
    """Every update was made once, every group that was reserved ended once, and none is outstanding."""

    def check(events: Sequence[Any], result: RunResult) -> None:
        commits = surviving_commits(events)
        assert [commit.version.update for commit in commits] == list(range(1, result.steps + 1))
        trained = Counter(group for commit in commits for group in commit.groups)
        assert max(trained.values()) == 1, "a group was trained twice"
        reserved = {e.group for e in events if isinstance(e, ev.GroupReserved) and e.purpose == "train"}
        assert result.pending == 0
        assert len(reserved) == result.trained + result.filtered + result.evicted + result.failed + result.unused
        assert len(trained) == result.trained

    return check
