"""What an evaluation reports, by hand."""

from asyncrl.report.scores import Scored, mean_scores
from asyncrl.types import EvalResult, Version


def test_responses_without_a_verdict_count_as_zero_and_are_counted() -> None:
    responses = [
        Scored("b", 1.0, "ok", 3),
        Scored("a", 0.5, "ok", 1),
        Scored("b", 0.0, "timeout", 8),
        Scored("b", 0.0, "invalid", 4),
    ]
    assert mean_scores(Version(2, 7), [[response] for response in responses]) == EvalResult(
        version=Version(2, 7),
        score=0.375,
        count=4,
        invalid=1,
        timeout=1,
        by_source={"a": 0.5, "b": 1.0 / 3},
        mean_length=4.0,
    )
