"""What the scored responses of an evaluation add up to. No seed: the same samples give the same figures."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from asyncrl.report.episodes import episode_metrics
from asyncrl.report.estimates import Estimate, estimate
from asyncrl.report.scores import Metric, Scored, check_drawable, mean_scores, measured, pass_at_k
from asyncrl.reward.results import Verdict
from asyncrl.rundir import atomic_file
from asyncrl.types import Episode, Generation, Prompt, Trajectory, Version

Vote = tuple[str, float]  # an answer, and the score of the response that gave it


def maj_at_k(votes: Sequence[Vote], k: int) -> float:
    """The expected score of the majority answer among k responses drawn without replacement (Wang et al. 2022,
    "Self-Consistency"), exactly: over all C(n, k) subsets, ties broken by a fair draw among the most frequent answers.

    An answer's score is the mean over the responses that gave it. Raises ValueError unless 1 <= k <= n.

    For each winning count t: a generating function with one factor per answer, sum over u < t of C(count, u) x^u for an answer
    that got fewer votes, C(count, t) x^t for one that shares the lead; x counts votes, and the number of leaders j is kept
    apart, since each leader wins with chance 1/j. For up to 1,000 responses: C(n, k) must fit a float.
    """
    check_drawable(len(votes), k)
    scores: dict[str, list[float]] = defaultdict(list)
    for answer, score in votes:
        scores[answer].append(score)
    answers = [(len(own), math.fsum(own) / len(own)) for own in scores.values()]
    won = math.fsum(_won(answers, t, k) for t in range(1, min(k, max(count for count, _ in answers)) + 1))
    return won / math.comb(len(votes), k)


def _won(answers: Sequence[tuple[int, float]], t: int, k: int) -> float:
    """Sum over the subsets of k whose leaders have exactly t votes, of the leaders' mean score."""
    # [leaders, votes]: how many subsets, and the sum over them of their leaders' scores; of integers, so counts are exact
    subsets, totals = np.zeros((k // t + 1, k + 1), object), np.zeros((k // t + 1, k + 1), object)
    subsets[0, 0] = 1
    for count, score in answers:
        fewer = np.array([math.comb(count, u) for u in range(min(t - 1, count) + 1)], object)
        led = math.comb(count, t) * subsets[:-1, :-t]
        won = math.comb(count, t) * totals[:-1, :-t] + led * score
        subsets, totals = (np.array([np.convolve(row, fewer)[: k + 1] for row in table]) for table in (subsets, totals))
        subsets[1:, t:] += led
        totals[1:, t:] += won
    return math.fsum(total / leaders for leaders, total in enumerate(totals[1:, k], start=1))


# ----------------------------------------------------------------------------------------- scored responses


class ScoredResponse(Struct, frozen=True, kw_only=True):
    """One sampled response and what the reward says of it."""

    prompt: Prompt
    rollout: int
    seed: int
    generation: Generation
    prompt_text: str  # both texts are without special tokens
    text: str
    verdict: Verdict
    setting: str = ""  # how it was sampled; empty: as the command's own flags say

    @property
    def episode(self) -> Episode | None:
        """How it was said, if it was in several turns."""
        return self.generation.episode if isinstance(self.generation, Trajectory) else None

    @property
    def length(self) -> int:
        """Tokens that the policy chose."""
        return sum(self.generation.loss_mask) if isinstance(self.generation, Trajectory) else len(self.generation.token_ids)

    @property
    def scored(self) -> Scored:
        """As metrics see it."""
        return Scored(
            self.prompt.data_source,
            self.score,
            self.verdict.status,
            self.length,
            self.prompt_text,
            self.text,
            msgspec.json.decode(self.prompt.ground_truth),
            self.generation.finish_reason,
            self.episode.measures() | {f"status/{self.verdict.status}": 1.0} if self.episode else {},
        )

    @property
    def score(self) -> float:
        """0 where there is no verdict: `invalid` and `timeout`."""
        return self.verdict.reward or 0.0

    @property
    def vote(self) -> str:
        """What a majority is counted by: the answer that the verifier read, else the whole response, blanks aside."""
        return self.text.strip() if self.verdict.answer is None else self.verdict.answer


def eval_summary(
    responses: Sequence[ScoredResponse], ks: Sequence[int] = (1,), pass_score: float = 1.0, metrics: Sequence[Metric] = ()
) -> dict[str, Any]:
    """What an evaluation in a run reports too (asyncrl/report/scores.py), over all samples; and `estimates`: mean score, pass@k
    and maj@k with 95% intervals over prompts, and what `metrics` say of each prompt, overall and by data source.

    responses: equally many per prompt, those of a prompt together. A response passes with a score of `pass_score` or more.
    """
    groups = [list(group) for _, group in groupby(responses, key=lambda response: response.prompt.row)]
    by_source: dict[str, list[list[ScoredResponse]]] = {}
    for group in groups:
        by_source.setdefault(group[0].prompt.data_source, []).append(group)
    means = mean_scores(Version(0, 0), [[response.scored for response in group] for group in groups])
    episodes = episode_metrics([response.scored.figures for response in responses if response.episode])
    estimates = {
        "overall": _estimates(groups, ks, pass_score, metrics),
        "by_source": {source: _estimates(of, ks, pass_score, metrics) for source, of in sorted(by_source.items())},
    }
    return {
        "prompts": len(groups),
        "samples": means.count,
        "score": means.score,
        "by_source": means.by_source,
        "invalid": means.invalid,
        "timeout": means.timeout,
        "mean_length": means.mean_length,
        **({"episodes": episodes} if episodes else {}),
        "estimates": msgspec.to_builtins(estimates),
    }


def _estimates(
    groups: Sequence[Sequence[ScoredResponse]], ks: Sequence[int], pass_score: float, metrics: Sequence[Metric]
) -> dict[str, Estimate]:
    scores = [[response.score for response in group] for group in groups]
    votes = [[(response.vote, response.score) for response in group] for group in groups]
    figures = {"score": estimate([sum(own) / len(own) for own in scores])}
    for k in ks:
        figures[f"pass@{k}"] = estimate([pass_at_k(len(own), sum(s >= pass_score for s in own), k) for own in scores])
    for k in ks:
        figures[f"maj@{k}"] = estimate([maj_at_k(own, k) for own in votes])
    own_metrics = measured([[response.scored for response in group] for group in groups], metrics)
    return figures | {name: estimate(values) for name, values in own_metrics.items()}


def write_samples(path: Path, responses: Sequence[ScoredResponse]) -> None:
    """One row per response, written beside and renamed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "setting": one.setting,
            "row": one.prompt.row,
            "rollout": one.rollout,
            "data_source": one.prompt.data_source,
            "ground_truth": one.prompt.readable_truth(),
            "prompt": one.prompt_text,
            "response": one.text,
            "answer": one.vote,
            "score": one.verdict.reward,
            "parts": json.dumps(one.verdict.parts),
            "said": json.dumps(one.verdict.said),
            "status": one.verdict.status,
            "error": one.verdict.error,
            "response_length": one.length,
            "finish_reason": one.generation.finish_reason,
            "seed": one.seed,
        }
        for one in responses
    ]
    with atomic_file(path) as beside:
        pq.write_table(pa.Table.from_pylist(rows), beside)


def write_transcripts(path: Path, responses: Sequence[ScoredResponse]) -> None:
    """What was said in each episode, as a line of JSON; no file where there are none."""
    lines = [
        {
            "setting": one.setting,
            "row": one.prompt.row,
            "rollout": one.rollout,
            "data_source": one.prompt.data_source,
            "status": one.verdict.status,
            "error": one.verdict.error,
            "reward": one.verdict.reward,
            "parts": one.verdict.parts,
            "stop": episode.stop,
            "turn_rewards": episode.turn_rewards,
            **episode.figures,
            "messages": msgspec.Raw(episode.messages.encode()),
            "seed": one.seed,
        }
        for one in responses
        if (episode := one.episode) is not None
    ]
    if lines:
        with atomic_file(path) as beside:
            beside.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
