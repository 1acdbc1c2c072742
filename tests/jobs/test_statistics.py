"""Figures by hand, and against brute force over every subset."""

import json
import math
from collections import Counter
from itertools import combinations

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.jobs.statistics import ScoredResponse, eval_summary, maj_at_k, pass_at_k, write_samples
from asyncrl.report.estimates import Estimate, estimate
from asyncrl.reward.results import Verdict
from asyncrl.types import Generation, Prompt


@pytest.mark.parametrize(
    ("n", "passed", "k", "expected"),
    [
        (1, 1, 1, 1.0),
        (4, 0, 2, 0.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 3 of the 6 pairs hold it
        (4, 2, 2, 5 / 6),  # one pair of six misses both
        (4, 3, 2, 1.0),
        (10, 3, 5, 11 / 12),  # 1 − 21/252
    ],
)
def test_pass_at_k_by_hand(n, passed, k, expected):
    assert pass_at_k(n, passed, k) == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(passes, data):
    k = data.draw(st.integers(1, len(passes)))
    subsets = list(combinations(passes, k))
    assert pass_at_k(len(passes), sum(passes), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 3])
def test_k_must_be_drawable(k):
    with pytest.raises(ValueError, match=rf"k={k} is outside \[1, n=2\]"):
        pass_at_k(2, 1, k)
    with pytest.raises(ValueError, match=rf"k={k} is outside \[1, n=2\]"):
        maj_at_k([("a", 1.0), ("b", 0.0)], k)


@pytest.mark.parametrize(
    ("votes", "k", "expected"),
    [
        ([("7", 1.0)], 1, 1.0),
        ([("7", 1.0), ("8", 0.0)], 1, 0.5),
        ([("7", 1.0), ("8", 0.0)], 2, 0.5),  # a tie, broken by a coin
        ([("7", 1.0), ("7", 1.0), ("8", 0.0)], 3, 1.0),
        ([("7", 1.0), ("7", 1.0), ("8", 0.0)], 2, 2 / 3),  # 77 wins; 78 twice is a tie
        ([("7", 1.0), ("8", 0.0), ("8", 0.0)], 3, 0.0),
        ([("7", 1.0), ("8", 0.0), ("9", 0.0)], 3, 1 / 3),
        ([("7", 1.0), ("7", 0.0)], 2, 0.5),  # one answer scored twice over
    ],
)
def test_maj_at_k_by_hand(votes, k, expected):
    assert maj_at_k(votes, k) == pytest.approx(expected)


def brute_force(votes, k):
    scores = {answer: [score for a, score in votes if a == answer] for answer, _ in votes}
    means = {answer: sum(own) / len(own) for answer, own in scores.items()}
    values = []
    for subset in combinations([answer for answer, _ in votes], k):
        counts = Counter(subset)
        leaders = [answer for answer, count in counts.items() if count == max(counts.values())]
        values.append(sum(means[answer] for answer in leaders) / len(leaders))
    return sum(values) / len(values)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=8), st.data())
def test_maj_at_k_is_the_mean_over_all_subsets(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    assert maj_at_k(votes, k) == pytest.approx(brute_force(votes, k))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_majority_of_one_is_the_mean_score(votes):
    assert maj_at_k(votes, 1) == pytest.approx(sum(score for _, score in votes) / len(votes))


def test_many_votes_stay_exact():
    votes = [("right", 1.0)] * 33 + [("wrong", 0.0)] * 31
    # Of 64 drawn all count: the majority is right. Of 63, 33:30 or 32:31, right both times.
    assert maj_at_k(votes, 64) == 1.0
    assert maj_at_k(votes, 63) == 1.0
    assert maj_at_k(votes, 1) == 33 / 64
    assert maj_at_k([("right", 1.0)] * 60 + [("wrong", 0.0)] * 60, 60) == pytest.approx(0.5)


def test_the_interval_by_hand():
    # mean 0.5; s² = 4 × 0.25 / 3; standard error √(1/12), so 0.25 · 12 = 3 draws; z² / 3 = 1.280486
    # √(0.25 · 1.280486 + 1.280486² / 4) / 2.280486 = 0.374666
    found = estimate([0.0, 1.0, 0.0, 1.0])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.125334, 0.874666), abs=1e-6)


def test_scores_beyond_shares_have_the_normal_interval():
    # mean 0; s² = 4 / 3; standard error √(1/3)
    found = estimate([-1.0, 1.0, -1.0, 1.0])
    assert (found.mean, found.low, found.high) == pytest.approx(
        (0.0, -1.959964 * math.sqrt(1 / 3), 1.959964 * math.sqrt(1 / 3))
    )


def test_the_interval_at_its_edges():
    assert estimate([0.75]) == Estimate(mean=0.75, low=None, high=None)
    # Two draws: (z²/4 ± z²/4) / (1 + z²/2) from the end; before, an interval of no width.
    assert estimate([1.0, 1.0]).low == pytest.approx(2 / (2 + 3.841459))
    assert estimate([1.0, 1.0]).high == 1.0
    assert estimate([0.0, 0.0]).high == pytest.approx(1 - 2 / (2 + 3.841459))
    one_in_ten = estimate([0.0] * 9 + [1.0])  # before: from -0.096
    assert 0 < one_in_ten.low < 0.1 < one_in_ten.high < 0.5


@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=20))
def test_bounds_of_shares_are_shares_and_hold_the_mean(values):
    found = estimate(values)
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(
    ("hard", "prompts", "responses", "covered"),
    [
        ((1.0, 1.0), 100, 4, 0.9575),  # the normal interval: 0.955
        ((9.7, 0.3), 50, 4, 0.945),  # 0.935
        ((9.7, 0.3), 20, 1, 0.9775),  # 0.445: where all prompts agree it has no width
        ((0.5, 9.5), 30, 4, 0.9525),  # 0.915
        ((1.0, 1.0), 10, 4, 0.9425),  # 0.9325
    ],
)
def test_the_interval_covers_what_it_says(hard, prompts, responses, covered):
    """400 evaluations: how often the true mean lies inside. The easiness of prompts is drawn from Beta(hard), and responses to
    one prompt share it: they are a cluster."""
    import random

    source, inside, mean = random.Random(0), 0, hard[0] / sum(hard)
    for _ in range(400):
        easiness = [source.betavariate(*hard) for _ in range(prompts)]
        found = estimate([sum(source.random() < p for _ in range(responses)) / responses for p in easiness])
        inside += found.low <= mean <= found.high
    assert inside / 400 == pytest.approx(covered)


# --------------------------------------------------------------------------------------------- samples


def answer(row, source, status, reward, length=1, response="", read=None):
    generation = Generation(id="", token_ids=[0] * length, logprobs=[], kept_logmass=None, spans=(), finish_reason="stop")
    prompt = Prompt(row=row, ids=(1,), data_source=source, ground_truth='"12"')
    verdict = Verdict(status, reward, answer=read)
    return ScoredResponse(
        prompt=prompt, rollout=0, seed=0, generation=generation, prompt_text="6+6=", text=response, verdict=verdict
    )


def test_failures_count_as_zero_in_the_mean():
    found = eval_summary(
        [
            answer(0, "a", "ok", 1.0, 1),
            answer(0, "a", "invalid", None, 2),
            answer(1, "b", "timeout", None, 3),
            answer(1, "b", "ok", 0.5, 6),
        ]
    )
    del found["estimates"]
    assert found == {
        "prompts": 2,
        "samples": 4,
        "score": 0.375,
        "by_source": {"a": 0.5, "b": 0.25},
        "invalid": 1,
        "timeout": 1,
        "mean_length": 3.0,
    }


def test_votes_are_the_answers_read_or_else_the_text():
    samples = [
        answer(0, "a", "ok", 1.0, response="it is 1/2", read="1/2"),
        answer(0, "a", "ok", 1.0, response="0.5!", read="1/2"),
        answer(0, "a", "ok", 0.0, response="2"),
        answer(1, "a", "ok", 0.0, response=" 7\n"),
        answer(1, "a", "ok", 0.0, response="7"),
        answer(1, "a", "invalid", None, response="8"),
    ]
    assert [sample.vote for sample in samples] == ["1/2", "1/2", "2", "7", "7", "8"]
    figures = eval_summary(samples, ks=(1, 3))["estimates"]["overall"]
    assert figures["maj@3"]["mean"] == 0.5  # prompt 0 by two votes of three, prompt 1 never
    assert figures["maj@1"]["mean"] == pytest.approx(1 / 3)
    assert figures["pass@3"]["mean"] == 0.5


def test_figures_by_source_are_those_of_its_prompts_alone():
    samples = [answer(0, "b", "ok", 1.0), answer(1, "a", "ok", 0.0), answer(2, "b", "ok", 0.0)]
    estimates = eval_summary(samples)["estimates"]
    assert list(estimates["by_source"]) == ["a", "b"]
    assert estimates["by_source"]["a"]["pass@1"] == {"mean": 0.0, "low": None, "high": None}
    assert estimates["by_source"]["b"]["score"]["mean"] == 0.5
    assert estimates["overall"]["score"]["mean"] == pytest.approx(1 / 3)


def test_one_row_per_response(tmp_path):
    write_samples(tmp_path / "s.parquet", [answer(3, "a", "ok", 1.0, 4, "so 12", "12")])
    [row] = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert (row["prompt"], row["ground_truth"]) == ("6+6=", "12")
    assert (row["row"], row["response"], row["answer"], row["score"], row["response_length"]) == (3, "so 12", "12", 1.0, 4)
    assert json.loads(row["parts"]) == {}
