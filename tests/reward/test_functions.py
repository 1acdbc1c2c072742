import asyncio
import json

import pytest

from asyncrl.config import RewardSpec, RewardTerm
from asyncrl.config.callables import load_callable
from asyncrl.errors import ConfigError
from asyncrl.reward.functions import alone, is_trl, load_judge, load_terms, weighted
from asyncrl.reward.functions import judge as judge_of
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample, Verdict


def judge(function, **fields):
    return judge_of(function, RewardTerm(function="m:f", **fields))


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


def test_an_error_names_the_users_line_not_that_of_a_library_or_of_asyncrl(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import json\n\ndef f(solution_str, ground_truth):\n    return json.loads(solution_str)\n")
    of_a_library = judge(load_callable(f"{path}:f"))(Sample("", "no json", '""', "null")).error
    assert of_a_library == f"JSONDecodeError: Expecting value: line 1 column 1 (char 0) ({path}:4 in f)"
    unread = judge(load_callable(f"{path}:f"))(Sample("", "1", "no json", "null")).error  # ours, in reading the row
    assert unread.startswith("DecodeError: JSON is malformed: ")
    assert ".py" not in unread


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
    score = load_judge(RewardTerm(function=f"{path}:compute_score"))
    assert score(Sample("openai/gsm8k", "so 1,172 of them\n#### 1,172", '"1172"', "null")) == Verdict("ok", 1.0, {"acc": 1.0})
    assert score(Sample("openai/gsm8k", "#### 7", '"1172"', "null")) == Verdict("ok", 0.0, {"acc": 0.0})
    assert score(Sample("openai/gsm8k", "no idea", '"1172"', "null")) == Verdict("ok", 0.0)


# ------------------------------------------------------------------------------------------ weighted sums

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


def test_token_rewards_are_summed_by_the_same_weights():
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


# ---------------------------------------------------------------------------------------- TRL's convention

CHAT = [{"role": "user", "content": "6 + 6?"}]
ROW = {"solution": "12", "level": 3, "prompt": CHAT}


def trl_sample(text, row=ROW, truth="null"):
    return Sample("sums", text, truth, '{"index":7}', json.dumps(row), [5, 6])


def completions_only(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def every_keyword(prompts, completions, completion_ids, solution, level, data_source, ground_truth, extra_info):
    assert prompts == [CHAT]
    assert completions == [[{"role": "assistant", "content": "12"}]]
    assert (completion_ids, solution, level) == ([[5, 6]], ["12"], [3])
    assert (data_source, ground_truth, extra_info) == (["sums"], [None], [{"index": 7}])
    return [2.0]


def ids_only(completion_ids, **kwargs):
    return [len(ids) for ids in completion_ids]


def takes_all(prompts, completions, **kwargs):
    columns = {"completion_ids", "solution", "level", "data_source", "ground_truth", "extra_info"}
    assert set(kwargs) == columns | {"log_extra", "log_metric"}
    return [2.0]


async def waits(completions, **kwargs):
    await asyncio.sleep(0)
    return [2.0]


class Instance:
    def __call__(self, completion_ids, **kwargs):
        return [float(len(completion_ids[0]))]


@pytest.mark.parametrize("function", [completions_only, every_keyword, ids_only, takes_all, waits, Instance()])
def test_it_is_called_as_trl_calls_it(function):
    assert is_trl(function)
    assert judge(function)(trl_sample("12")) == Verdict("ok", 2.0)


def test_metrics_that_it_logs_become_parts():
    def logs(completions, log_extra=None, log_metric=None, **kwargs):
        log_extra("seen", completions)
        log_metric("words", 3.0)
        return [0.5]

    assert judge(logs)(trl_sample("12")) == Verdict("ok", 0.5, {"words": 3.0})


def test_what_only_a_trainer_knows_is_named():
    def scheduled(completions, trainer_state, **kwargs):
        return [1.0]

    assert "it takes ['trainer_state'], which the dataset row does not have" in judge(scheduled)(trl_sample("12")).error


def test_a_plain_prompt_has_plain_completions():
    def starts(prompts, completions, **kwargs):
        return [float(prompt == "6+6=" and completion == "12") for prompt, completion in zip(prompts, completions, strict=True)]

    assert judge(starts)(trl_sample("12", {"prompt": "6+6="})) == Verdict("ok", 1.0)


def test_none_is_no_failure_and_no_reward():
    assert judge(lambda completions, **kwargs: [None])(trl_sample("x")) == Verdict("ok", None)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions, level, rating, **kwargs: [1.0], "takes ['rating'], which the dataset row does not have; its col"),
        (lambda completions, **kwargs: 1.0, "returned 1.0 for one completion; expected a list of one number or None"),
        (lambda completions, **kwargs: [], "returned [] for one completion"),
        (lambda completions, **kwargs: ["good"], "returned str 'good'; expected a finite number"),
        (lambda completions, **kwargs: [float("nan")], "returned float nan"),
    ],
)
def test_results_that_are_no_reward_are_invalid(function, words):
    verdict = judge(function)(trl_sample("12"))
    assert (verdict.status, verdict.reward) == ("invalid", None)
    assert words in verdict.error


def test_the_style_can_be_said_where_the_parameters_do_not_tell():
    def opaque(**fields):
        return [1.0] if "completions" in fields else 0.25

    assert judge(opaque)(trl_sample("x")).reward == 0.25
    assert judge(opaque, style="trl")(trl_sample("x")).reward == 1.0


def test_arguments_are_passed_as_they_are_in_both_styles():
    def of_trl(completions, scale, **kwargs):
        return [scale]

    def of_verl(data_source, solution_str, ground_truth, extra_info=None, *, scale):
        return scale

    assert judge(of_trl, arguments={"scale": 0.5})(trl_sample("x")).reward == 0.5
    assert judge(of_verl, arguments={"scale": 0.5})(trl_sample("x")).reward == 0.5


# The example of TRL's documentation, as a user has it in a file.
DOCUMENTED = '''
import re

def reward_func(completions, ground_truth, **kwargs):
    """Rewards what stands in the box."""
    matches = [re.search(r"\\\\boxed\\{(.*?)\\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]
'''


def test_a_file_in_trls_convention(tmp_path):
    (tmp_path / "boxed.py").write_text(DOCUMENTED)
    score = load_judge(RewardTerm(function=f"{tmp_path}/boxed.py:reward_func"))
    assert score(trl_sample(r"so \boxed{12}", {"prompt": "6+6="}, truth='"12"')) == Verdict("ok", 1.0)
    assert score(trl_sample(r"so \boxed{13}", {"prompt": "6+6="}, truth='"12"')) == Verdict("ok", 0.0)
