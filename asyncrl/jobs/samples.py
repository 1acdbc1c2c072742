"""The scored responses of an evaluation: what they add up to, and their parquet file."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from asyncrl.jobs.statistics import Estimate, estimate, maj_at_k, pass_at_k
from asyncrl.rundir import atomic_file
from asyncrl.types import Generation, Prompt

if TYPE_CHECKING:
    from asyncrl.reward.frames import Verdict


class Answer(Struct, frozen=True, kw_only=True):
    """One sampled response and what the reward says of it."""

    prompt: Prompt
    rollout: int
    seed: int
    generation: Generation
    response: str
    verdict: "Verdict"

    @property
    def score(self) -> float:
        """0 where there is no verdict: `invalid` and `timeout`."""
        return self.verdict.reward or 0.0

    @property
    def vote(self) -> str:
        """What a majority is counted by: the answer that the verifier read, else the whole response, blanks aside."""
        return self.response.strip() if self.verdict.answer is None else self.verdict.answer


def summary(answers: Sequence[Answer], ks: Sequence[int] = (1,), pass_score: float = 1.0) -> dict[str, Any]:
    """Mean score over all samples; `invalid` and `timeout` ones count as 0 in it, and are reported. mean_length: tokens.

    estimates: mean score, pass@k and maj@k with 95% intervals over prompts (jobs/statistics.py), overall and by data source.
    answers: equally many per prompt, those of a prompt together. A response passes with a score of `pass_score` or more.
    """
    groups = [list(group) for _, group in groupby(answers, key=lambda answer: answer.prompt.row)]
    by_source: dict[str, list[list[Answer]]] = {}
    for group in groups:
        by_source.setdefault(group[0].prompt.data_source, []).append(group)
    estimates = {source: _estimates(of, ks, pass_score) for source, of in sorted(by_source.items())}
    overall = _estimates(groups, ks, pass_score)
    return {
        "prompts": len(groups),
        "samples": len(answers),
        "score": overall["score"].mean,
        "by_source": {source: figures["score"].mean for source, figures in estimates.items()},
        "invalid": sum(answer.verdict.status == "invalid" for answer in answers),
        "timeout": sum(answer.verdict.status == "timeout" for answer in answers),
        "mean_length": sum(len(answer.generation.token_ids) for answer in answers) / len(answers),
        "estimates": msgspec.to_builtins({"overall": overall, "by_source": estimates}),
    }


def _estimates(groups: Sequence[Sequence[Answer]], ks: Sequence[int], pass_score: float) -> dict[str, Estimate]:
    scores = [[answer.score for answer in group] for group in groups]
    votes = [[(answer.vote, answer.score) for answer in group] for group in groups]
    figures = {"score": estimate([sum(own) / len(own) for own in scores])}
    for k in ks:
        figures[f"pass@{k}"] = estimate([pass_at_k(len(own), sum(s >= pass_score for s in own), k) for own in scores])
    for k in ks:
        figures[f"maj@{k}"] = estimate([maj_at_k(own, k) for own in votes])
    return figures


def write_samples(path: Path, answers: Sequence[Answer]) -> None:
    """One row per response, written beside and renamed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "row": answer.prompt.row,
            "rollout": answer.rollout,
            "data_source": answer.prompt.data_source,
            "ground_truth": answer.prompt.ground_truth,
            "response": answer.response,
            "answer": answer.vote,
            "score": answer.verdict.reward,
            "parts": json.dumps(answer.verdict.parts),
            "status": answer.verdict.status,
            "error": answer.verdict.error,
            "response_length": len(answer.generation.token_ids),
            "finish_reason": answer.generation.finish_reason,
            "seed": answer.seed,
        }
        for answer in answers
    ]
    with atomic_file(path) as beside:
        pq.write_table(pa.Table.from_pylist(rows), beside)
