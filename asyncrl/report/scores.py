"""What an evaluation reports, in a run and from `asyncrl eval` alike."""

from collections.abc import Sequence
from typing import NamedTuple

from asyncrl.types import EvalResult, Status, Version


class Scored(NamedTuple):
    """One held-out response."""

    data_source: str
    reward: float  # 0 where there is no verdict
    status: Status | None
    length: int  # tokens


def mean_scores(version: Version, responses: Sequence[Scored]) -> EvalResult:
    """Means over all responses, and over those of each data source. Those without a verdict count as 0, and are counted."""
    by_source: dict[str, list[float]] = {}
    for response in responses:
        by_source.setdefault(response.data_source, []).append(response.reward)
    count = len(responses)
    return EvalResult(
        version=version,
        score=sum(response.reward for response in responses) / count,
        count=count,
        invalid=sum(response.status == "invalid" for response in responses),
        timeout=sum(response.status == "timeout" for response in responses),
        by_source={source: sum(rewards) / len(rewards) for source, rewards in sorted(by_source.items())},
        mean_length=sum(response.length for response in responses) / count,
    )
