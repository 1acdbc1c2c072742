"""What an evaluation reports, in a run and from `asyncrl eval` alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from asyncrl.config.callables import describe
from asyncrl.errors import ConfigError
from asyncrl.report.episodes import episode_metrics
from asyncrl.types import EvalResult, Status, Version


class Scored(NamedTuple):
    """One held-out response; its texts are there where metrics of the user's own look at them."""

    data_source: str
    reward: float  # 0 where there is no verdict
    status: Status | None
    length: int  # tokens that the policy chose
    prompt: str = ""  # both texts are without special tokens
    response: str = ""
    ground_truth: Any = None
    finish_reason: str = ""
    figures: Mapping[str, float] = {}  # how its episode went, if it is one (types.EpisodeSummary.measures)


Metric = Callable[[Sequence[Scored]], Mapping[str, float]]


def mean_scores(version: Version, groups: Sequence[Sequence[Scored]], metrics: Sequence[Metric] = ()) -> EvalResult:
    """Means over all responses, and over those of each data source. Those without a verdict count as 0, and are counted.

    groups: the responses to each prompt. With several, pass@k too: a response passes with a reward of 1 or more. Of episodes
    also how they went.
    Raises ConfigError as `measured`.
    """
    responses = [response for group in groups for response in group]
    by_source: dict[str, list[float]] = {}
    for response in responses:
        by_source.setdefault(response.data_source, []).append(response.reward)
    count, n = len(responses), len(groups[0])
    per_prompt = measured(groups, metrics)
    for k in powers(n) if n > 1 else ():
        per_prompt[f"pass@{k}"] = [pass_at_k(n, sum(r.reward >= 1 for r in group), k) for group in groups]
    return EvalResult(
        version=version,
        score=sum(response.reward for response in responses) / count,
        count=count,
        invalid=sum(response.status == "invalid" for response in responses),
        timeout=sum(response.status == "timeout" for response in responses),
        by_source={source: sum(rewards) / len(rewards) for source, rewards in sorted(by_source.items())},
        mean_length=sum(response.length for response in responses) / count,
        more={name: math.fsum(values) / len(values) for name, values in per_prompt.items()}
        | episode_metrics([response.figures for response in responses if response.figures]),
    )


def measured(groups: Sequence[Sequence[Scored]], metrics: Sequence[Metric]) -> dict[str, list[float]]:
    """What the user's metrics say of each prompt, by `metric/<name>`; of the prompts of which they say anything.

    Raises ConfigError if one of them fails, or returns what is no dict of finite numbers.
    """
    found: dict[str, list[float]] = {}
    for metric in metrics:
        for group in groups:
            try:
                for name, value in metric(group).items():
                    if not math.isfinite(value):
                        raise ValueError(f"{name}={value} is not finite")
                    found.setdefault(f"metric/{name}", []).append(float(value))
            except Exception as error:
                called = getattr(metric, "__name__", type(metric).__name__)
                raise ConfigError(f"evaluation.metrics: {called} failed: {describe(error, metric.__module__)}") from error
    return found


def powers(n: int) -> list[int]:
    """The k of pass@k out of n: 1, 2, 4, … and n."""
    return sorted({n, *(1 << power for power in range(n.bit_length()))})


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that k of n responses, drawn without replacement, hold one of the `passed`: 1 − C(n−c, k) / C(n, k).

    Unbiased for the pass rate of k fresh samples (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1).
    Raises ValueError unless 1 <= k <= n.
    """
    check_drawable(n, k)
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def check_drawable(n: int, k: int) -> None:
    """Raises ValueError unless k responses can be drawn from n."""
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is outside [1, n={n}]: k responses must be drawn from the n that there are")
