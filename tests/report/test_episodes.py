"""What episodes come to, by hand."""

import pytest

from asyncrl.report.episodes import episode_metrics
from asyncrl.types import Episode


def test_means_shares_and_frequencies() -> None:
    first = Episode(
        turn_rewards=(0.0, 0.25, 1.0),
        figures={"turns": 3, "segments": 1, "tokens": 30, "read_tokens": 12, "tool_calls": 4, "tool_failures": 1},
    )
    second = Episode(
        stop="max_turns",
        turn_rewards=(0.5,),
        figures={"turns": 1, "segments": 2, "tokens": 10, "read_tokens": 0, "environment_s": 3.0, "engine_s": 1.0},
    )
    third = Episode(status="timeout", stop="deadline", figures={"turns": 2, "tool_calls": 1, "malformed_calls": 1})
    told = [episode.measures() | {f"status/{episode.status}": 1.0} for episode in (first, second, third)]
    found = episode_metrics(told)
    assert (found["num_turns/mean"], found["num_turns/min"], found["num_turns/max"]) == (2.0, 1.0, 3.0)
    assert found["tools/call_frequency"] == pytest.approx(5 / 3)  # per episode
    assert (found["tools/failure_frequency"], found["tools/malformed_frequency"]) == (0.2, 0.2)  # of the calls
    assert (found["episode/segments"], found["episode/read_tokens"]) == (1.0, 4.0)
    assert (found["episode/environment_s"], found["episode/engine_s"]) == (1.0, pytest.approx(1 / 3))
    stops = {name: found[f"episode/stop/{name}"] for name in ("done", "max_turns", "max_tokens", "deadline", "error")}
    third_each = pytest.approx(1 / 3)
    assert stops == {"done": third_each, "max_turns": third_each, "max_tokens": 0.0, "deadline": third_each, "error": 0.0}
    assert (found["episode/status/ok"], found["episode/status/timeout"]) == (pytest.approx(2 / 3), third_each)
    earned = [found[f"episode/turn_reward/{turn}"] for turn in (1, 2, 3)]
    assert earned == [0.25, 0.25, 1.0]  # of those that came so far
    assert "oldest_update" not in found


def test_of_no_episode_there_is_nothing_to_say() -> None:
    assert episode_metrics([]) == {}
    only = episode_metrics([Episode().measures() | {"oldest_update": 3, "newest_update": 5}, Episode().measures()])
    assert (only["oldest_update"], only["newest_update"]) == (3, 5)
    assert only["tools/failure_frequency"] == 0.0
    assert not [name for name in only if "status" in name]
