import asyncio
import json

import pytest

from asyncrl.reward.frames import Sample, Verdict
from asyncrl.reward.functions import judge, load_judge
from asyncrl.reward.trl import is_trl

CHAT = [{"role": "user", "content": "6 + 6?"}]
ROW = {"solution": "12", "level": 3, "prompt": CHAT}


def sample(text, row=ROW, truth="null"):
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
    assert judge(function)(sample("12")) == Verdict("ok", 2.0)


def test_metrics_that_it_logs_become_parts():
    def logs(completions, log_extra=None, log_metric=None, **kwargs):
        log_extra("seen", completions)
        log_metric("words", 3.0)
        return [0.5]

    assert judge(logs)(sample("12")) == Verdict("ok", 0.5, {"words": 3.0})


def test_what_only_a_trainer_knows_is_named():
    def scheduled(completions, trainer_state, **kwargs):
        return [1.0]

    assert "it takes ['trainer_state'], which the dataset row does not have" in judge(scheduled)(sample("12")).error


def test_a_plain_prompt_has_plain_completions():
    def starts(prompts, completions, **kwargs):
        return [float(prompt == "6+6=" and completion == "12") for prompt, completion in zip(prompts, completions, strict=True)]

    assert judge(starts)(sample("12", {"prompt": "6+6="})) == Verdict("ok", 1.0)


def test_none_is_no_failure_and_no_reward():
    assert judge(lambda completions, **kwargs: [None])(sample("x")) == Verdict("ok", None)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions, level, rating, **kwargs: [1.0], "takes ['rating'], which the dataset row does not have; its col"),
        (lambda completions, **kwargs: 1.0, "returned 1.0 for one completion; expected a list of one number or None"),
        (lambda completions, **kwargs: [], "returned [] for one completion"),
        (lambda completions, **kwargs: ["good"], "returned str 'good'; expected a finite number"),
        (lambda completions, **kwargs: [float("nan")], "returned nan"),
    ],
)
def test_answers_that_are_no_reward_are_invalid(function, words):
    verdict = judge(function)(sample("12"))
    assert (verdict.status, verdict.reward) == ("invalid", None)
    assert words in verdict.error


def test_the_style_can_be_said_where_the_parameters_do_not_tell():
    def opaque(**fields):
        return [1.0] if "completions" in fields else 0.25

    assert judge(opaque)(sample("x")).reward == 0.25
    assert judge(opaque, style="trl")(sample("x")).reward == 1.0


def test_arguments_are_passed_as_they_are_in_both_styles():
    def of_trl(completions, scale, **kwargs):
        return [scale]

    def of_verl(data_source, solution_str, ground_truth, extra_info=None, *, scale):
        return scale

    assert judge(of_trl, arguments={"scale": 0.5})(sample("x")).reward == 0.5
    assert judge(of_verl, arguments={"scale": 0.5})(sample("x")).reward == 0.5


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
    score = load_judge(f"{tmp_path}/boxed.py:reward_func")
    assert score(sample(r"so \boxed{12}", {"prompt": "6+6="}, truth='"12"')) == Verdict("ok", 1.0)
    assert score(sample(r"so \boxed{13}", {"prompt": "6+6="}, truth='"12"')) == Verdict("ok", 0.0)
