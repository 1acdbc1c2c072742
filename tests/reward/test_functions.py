import pytest

from asyncrl.errors import ConfigError
from asyncrl.reward.frames import Sample, Verdict
from asyncrl.reward.functions import judge, load_judge

SAMPLE = Sample("gsm8k", "it is #### 72", '"72"', '{"index":3}')


def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert extra_info == {"index": 3}
    return float(data_source == "gsm8k" and solution_str.endswith(ground_truth))


def keyword_only(*, solution_str, ground_truth, data_source, extra_info):
    return verl(data_source, solution_str, ground_truth, extra_info)


def everything(**fields):
    return verl(**fields)


def renamed(source, answer, truth, info):
    return verl(source, answer, truth, info)


def three(source, answer, truth):
    return verl(source, answer, truth, {"index": 3})


def some(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0):
    return score if method == "strict" and solution_str.endswith(ground_truth) else format_score


async def awaitable(data_source, solution_str, ground_truth, extra_info=None):
    return verl(data_source, solution_str, ground_truth, extra_info)


@pytest.mark.parametrize("function", [verl, keyword_only, everything, renamed, three, some, awaitable])
def test_calling_conventions(function):
    assert judge(function)(SAMPLE) == Verdict("ok", 1.0)


def by_token(solution_str, ground_truth, response_ids, turns=(7,), **kwargs):
    assert sorted(kwargs) == ["data_source", "extra_info"]
    return {"score": 1.0, "token_rewards": [0.5 * (i == 9) for i in response_ids], "turn_rewards": [0.25 for _ in turns]}


def test_a_function_that_names_the_tokens_gets_them():
    sample = Sample("gsm8k", "", "null", "null", "{}", [9, 8, 9, 1], (0, 2))
    assert judge(by_token)(sample) == Verdict("ok", 1.0, token_rewards=[0.5, 0.25, 0.5, 0.25])
    assert judge(everything)(SAMPLE).reward == 1.0  # a `**fields` is not given what it may not know


def test_a_function_of_other_parameter_names_gets_them_too():
    def renamed(source, answer, truth, extra=None, *, turns=None):
        return {"score": 1.0, "turn_rewards": [0.5 for _ in turns]}

    sample = Sample("gsm8k", "", "null", "null", "{}", [9, 8, 9, 1], (0, 2))
    assert judge(renamed)(sample).token_rewards == [0.0, 0.5, 0.0, 0.5]


def test_an_argument_of_the_recipe_goes_before_what_the_rollout_has_of_that_name():
    def weighed(solution_str, turns):
        return float(turns)

    assert judge(weighed, arguments={"turns": 5})(SAMPLE).reward == 5.0


def test_a_signature_that_cannot_be_called_is_a_config_error():
    with pytest.raises(ConfigError, match=r"takes \(a, b, c, d, e\), but is called as \(data_source, solution_str"):
        judge(lambda a, b, c, d, e: 0.0)


@pytest.mark.parametrize("error", [ValueError("no digits"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_is_raised_becomes_invalid_with_type_message_and_line(error):
    def raises(data_source, solution_str, ground_truth, extra_info=None):
        raise error

    verdict = judge(raises)(SAMPLE)
    assert verdict.status == "invalid"
    assert f"{type(error).__name__}: {error}" in verdict.error
    assert "test_functions.py" in verdict.error
    assert "in raises" in verdict.error


# What a user of verl brings along: a file in its calling convention, scored as its GSM8K reward does.
GSM8K = """
import re

def extract_solution(solution_str, method="strict"):
    solutions = re.findall("#### (\\\\-?[0-9\\\\.\\\\,]+)", solution_str)
    return solutions[-1].replace(",", "").replace("$", "") if solutions else None

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    answer = extract_solution(solution_str=solution_str)
    if answer is None:
        return 0
    return {"score": 1.0, "acc": True} if answer == ground_truth else {"score": 0.0, "acc": False}
"""


def test_a_gsm8k_compute_score_file(tmp_path):
    path = tmp_path / "gsm8k.py"
    path.write_text(GSM8K)
    score = load_judge(f"{path}:compute_score")
    assert score(Sample("openai/gsm8k", "so 1,172 of them\n#### 1,172", '"1172"', "null")) == Verdict("ok", 1.0, {"acc": 1.0})
    assert score(Sample("openai/gsm8k", "#### 7", '"1172"', "null")) == Verdict("ok", 0.0, {"acc": 0.0})
    assert score(Sample("openai/gsm8k", "no idea", '"1172"', "null")) == Verdict("ok", 0.0)
