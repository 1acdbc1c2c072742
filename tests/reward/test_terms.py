import pytest

from asyncrl.config import RewardSpec, RewardTerm
from asyncrl.errors import ConfigError
from asyncrl.reward.frames import Sample, Verdict
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.terms import alone, load_terms, weighted

SOURCE = """
def right(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "digits": len(solution_str), "pred": solution_str}

def short(completions, limit, **kwargs):
    if not completions[0]:
        return [None]
    return [float(len(completions[0]) <= limit)]

def breaks(data_source, solution_str, ground_truth, extra_info=None):
    raise ValueError("no")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE)
    return str(path)


def terms(file, **weights):
    functions = [
        RewardTerm(function=f"{file}:{name}", weight=weight, arguments={"limit": 2} if name == "short" else {})
        for name, weight in weights.items()
    ]
    return RewardSpec(functions=tuple(functions)).terms()


def sample(text):
    return Sample("sums", text, '"12"', "null")


def test_the_reward_is_the_weighted_sum_and_the_parts_are_named(file):
    score = load_terms(terms(file, right=2.0, short=0.5))
    assert score(sample("12")) == Verdict("ok", 2.5, {"right": 1.0, "right/digits": 2.0, "short": 1.0}, answer="12")
    assert score(sample("134")) == Verdict("ok", 0.0, {"right": 0.0, "right/digits": 3.0, "short": 0.0}, answer="134")


def test_what_tokens_earn_is_summed_by_the_same_weights():
    judges = [
        lambda sample: Verdict("ok", 1.0, token_rewards=[1.0, 2.0]),
        lambda sample: Verdict("ok", 1.0),
        lambda sample: Verdict("ok", 0.0, token_rewards=[0.0, 4.0]),
    ]
    named = [RewardTerm(function="m:f", name=name, weight=weight) for name, weight in (("a", 2.0), ("b", 1.0), ("c", -0.5))]
    assert weighted(named, judges)(sample("")).token_rewards == [2.0, 2.0]
    assert weighted(named[1:2], judges[1:2])(sample("")).token_rewards is None
    assert alone(judges[0])(sample("")).token_rewards == [1.0, 2.0]


def test_what_does_not_apply_is_left_out_of_sum_and_parts(file):
    score = load_terms(terms(file, right=-1.0, short=0.5))
    assert score(sample("")) == Verdict("ok", 0.0, {"right": 0.0, "right/digits": 0.0}, answer="")


def test_one_failure_makes_the_sample_invalid_and_names_the_function(file):
    verdict = load_terms(terms(file, right=1.0, breaks=1.0))(sample("12"))
    assert (verdict.status, verdict.reward, verdict.parts) == ("invalid", None, {})
    assert verdict.error.startswith("breaks: ValueError: no")


def test_a_sample_to_which_nothing_applies_is_invalid():
    nothing = lambda sample: Verdict("ok")  # noqa: E731
    term = RewardTerm(function="m:f", name="f")
    for score in (alone(nothing), weighted([term], [nothing])):
        assert score(sample("")) == Verdict(
            "invalid", error="no reward function applies to this sample: each returned None for it"
        )


def test_a_single_function_keeps_the_names_of_its_parts(file):
    score = load_terms(RewardSpec(function=f"{file}:right").terms())
    assert score(sample("12")) == Verdict("ok", 1.0, {"digits": 2.0}, answer="12")


def test_terms_travel_to_the_scoring_process(file):
    with RewardPool[int](terms(file, right=1.0, short=0.25)) as pool:
        [verdict] = pool.map([sample("12")])
    assert (verdict.reward, verdict.parts["short"], verdict.answer) == (1.25, 1.0, "12")


def test_one_function_that_is_missing_fails_the_pool(file):
    with pytest.raises(ConfigError, match="did you mean 'short'"), RewardPool[int](terms(file, right=1.0, shorty=1.0)):
        pass
