"""The table of metrics: every name stands for one thing."""

import re
from collections import Counter

import pytest

from asyncrl.report.names import described, prometheus_name, table

EXAMPLE = {"generator": "generator-3", "reward": "reward-0", "model": "model-0.1", "actor": "learner", "state": "wait:store"}
EXAMPLE |= {"rank": "critic-1", "lag": "2", "k": "4", "turn": "1"}


def test_no_name_stands_twice_and_all_say_something() -> None:
    names = Counter(name for row in table() for name in row.each())
    assert [name for name, count in names.items() if count > 1] == []
    assert [
        row.name for row in table() if not row.meaning or row.kind not in ("update", "evaluation", "actors", "warm start")
    ] == []


def test_each_row_is_found_by_its_own_names() -> None:
    for row in table():
        for name in row.each():
            found = described(re.sub(r"<(\w+)>", lambda part: EXAMPLE.get(part[1], part[1]), name))
            assert found is not None, name
            assert (found.row, found.name) == (row, name)


@pytest.mark.parametrize(
    ("metric", "name", "what"),
    [
        ("reward/mean/gsm8k", "reward/mean/<source>", {"source": "gsm8k"}),
        ("reward/format", "reward/<part>", {"part": "format"}),
        ("correction/ess_lag_3", "correction/ess_lag_<lag>", {"lag": "3"}),
        ("eval/hard/score/a/b", "eval/score/<source>", {"source": "a/b", "setting": "hard"}),
        ("eval/hard/num_turns/mean", "num_turns/mean", {"setting": "hard"}),
        ("eval/episode/stop/done", "episode/stop/<reason>", {"reason": "done"}),
        ("actors/generator-0/wait:store", "<actor>/<state>_s", {"actor": "generator-0", "state": "wait:store"}),
        ("critic/wait:start_s", "<actor>/<state>_s", {"actor": "critic", "state": "wait:start"}),
        ("critic/critic_bytes", "<rank>/critic_bytes", {"rank": "critic"}),
        ("learner-1/busy_s", "<actor>/<state>_s", {"actor": "learner-1", "state": "busy"}),
        ("actors/reward-2/scored", "<reward>/scored", {"reward": "reward-2"}),
    ],
)
def test_what_a_run_says_is_told_apart(metric: str, name: str, what: dict[str, str]) -> None:
    found = described(metric)
    assert found is not None
    assert (found.name, found.what) == (name, what)


@pytest.mark.parametrize("metric", ["nonsense", "timing_s/nonsense", "perf/", "staleness/lag_x", "actors/learner/nonsense/x"])
def test_what_is_not_in_the_table_is_not_found(metric: str) -> None:
    assert described(metric) is None


@pytest.mark.parametrize(
    ("metric", "name", "labels"),
    [
        ("reward/mean", "asyncrl_reward_mean", {}),
        ("reward/mean/gsm8k", "asyncrl_reward_mean_by_source", {"source": "gsm8k"}),
        ("gap/k3_lag_2", "asyncrl_gap_k3_lag_by_lag", {"lag": "2"}),
        ("eval/score", "asyncrl_eval_score", {"setting": ""}),
        ("eval/hard/score/a", "asyncrl_eval_score_by_source", {"setting": "hard", "source": "a"}),
        ("eval/num_turns/mean", "asyncrl_eval_num_turns_mean", {"setting": ""}),
        ("eval/pass@4", "asyncrl_eval_pass_by_k", {"setting": "", "k": "4"}),
        ("actors/learner/wait:store", "asyncrl_actors_by_state", {"actor": "learner", "state": "wait:store"}),
        ("actors/generator-0/tokens_per_s", "asyncrl_actors_tokens_per_s", {"actor": "generator-0"}),
        ("actors/store/store/ready", "asyncrl_actors_store_store_ready", {}),
        ("of/mine-1", "asyncrl_of_mine_1", {}),
    ],
)
def test_prometheus_has_names_without_what_differs_within_a_run(metric: str, name: str, labels: dict[str, str]) -> None:
    assert prometheus_name(metric) == (name, labels)


def test_no_two_rows_are_one_name_in_prometheus() -> None:
    labels: dict[str, list[set[str]]] = {}
    for row in table():
        for name in row.each() if row.kind != "warm start" else ():
            found, what = prometheus_name(re.sub(r"<(\w+)>", lambda part: EXAMPLE.get(part[1], part[1]), name))
            labels.setdefault(found, []).append(set(what))
    several = {name for name, found in labels.items() if len(found) > 1}
    assert several == {"asyncrl_critic_values_mean", "asyncrl_critic_returns_mean", "asyncrl_actors_invalid"}
    assert all(found[0] == other for found in labels.values() for other in found)
