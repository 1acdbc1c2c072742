"""How episodes went, in figures under the names users know: `num_turns` is verl's, `tools` TRL's. Pure."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import get_args

from asyncrl.types import EpisodeStop, Status

_MEANS = ("segments", "tokens", "read_tokens", "environment_s", "engine_s")


def episode_metrics(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the measures of each (`types.EpisodeSummary.measures`) come to; nothing of no episode. With `status/…` among them
    also the shares of these, with `oldest_update` and `newest_update` between which updates the weights were.

    The policy's answers are the turns. Failures, and calls that could not be read, are shares of the calls of tools.
    """
    if not episodes:
        return {}

    def named(prefix: str) -> list[str]:
        return sorted({name for one in episodes for name in one if name.startswith(prefix)})

    def of(name: str, otherwise: float = 0.0) -> list[float]:
        return [one.get(name, otherwise) for one in episodes]

    turns, calls = of("turns"), sum(of("tool_calls"))
    shares = [f"stop/{stop}" for stop in get_args(EpisodeStop)]
    shares += [f"status/{status}" for status in get_args(Status)] if named("status/") else []
    figures = {
        "num_turns/mean": fmean(turns),
        "num_turns/min": min(turns),
        "num_turns/max": max(turns),
        "tools/call_frequency": calls / len(episodes),
        "tools/failure_frequency": sum(of("tool_failures")) / max(1.0, calls),
        "tools/malformed_frequency": sum(of("malformed_calls")) / max(1.0, calls),
        **{f"episode/{name}": fmean(of(name)) for name in (*_MEANS, *shares)},
    }
    for name in named("turn_reward/"):  # of the episodes that came so far
        figures[f"episode/{name}"] = fmean(one[name] for one in episodes if name in one)
    if named("oldest_update"):
        figures["oldest_update"] = min(of("oldest_update", float("inf")))
        figures["newest_update"] = max(of("newest_update"))
    return figures
