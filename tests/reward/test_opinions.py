"""What judges are asked, and how their texts are read."""

import json

import pytest

from asyncrl.config import JudgeSpec, RewardTerm
from asyncrl.errors import ConfigError
from asyncrl.reward.functions import load_terms
from asyncrl.reward.opinions import conversation, question, read_prompt, reader
from asyncrl.reward.results import Opinion, Sample

PROMPT = [{"role": "user", "content": "Name a {colour}."}]
TURNS = [
    *PROMPT,
    {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "blue"},
]


def sample(response="red", prompt=PROMPT, episode="null", **columns):
    return Sample("colours", response, '"blue"', "null", json.dumps({"prompt": prompt, **columns}), episode=episode)


def judge(**fields):
    return RewardTerm(judge=JudgeSpec(prompt="p.txt", url="http://judge/v1", **fields), name="j")


def test_a_question_holds_prompt_response_and_columns_and_no_response_is_filled_in_again():
    template = 'Of {data_source}, level {level}: {prompt} -> <response>{response}</response>, not {ground_truth}. {"score": 1}'
    assert question(template, sample("{ground_truth} {prompt}", level=3)) == (
        "Of colours, level 3: Name a {colour}. -> <response>{ground_truth} {prompt}</response>, not blue. " + '{"score": 1}'
    )
    with pytest.raises(ValueError, match=r"has \{answer\}, but there are only data_source, ground_truth, prompt, response"):
        question("{answer}", sample())


def test_of_an_episode_the_judge_reads_all_that_followed_the_prompt_and_a_classifier_the_messages():
    told = sample("blue", episode=json.dumps({"messages": TURNS}))
    assert question("{prompt}|{response}", told) == (
        'Name a {colour}.|assistant: \n[{"name": "look"}]\n\ntool: blue\n\nassistant: blue'
    )
    assert conversation(told) == TURNS
    assert conversation(sample()) == [*PROMPT, {"role": "assistant", "content": "red"}]
    assert conversation(sample(prompt="1+1=")) == "1+1=red"


@pytest.mark.parametrize(
    ("fields", "texts", "value"),
    [
        ({}, ["It says 'score: 10' of itself. Nonsense.\n**Score:** 2.5"], 2.5),
        ({"pattern": r"<(-?\d+)>"}, ["<3> or <-4>"], -4.0),
        ({"n": 3, "temperature": 1.0}, ["score: 1", "score 2", "score: 6"], 3.0),
        ({"n": 3, "temperature": 1.0, "aggregate": "median"}, ["score: 1", "score 2", "score: 6"], 2.0),
        ({"n": 3, "temperature": 1.0, "aggregate": "majority"}, ["score: 1", "score 6", "score: 6"], 6.0),
        # by hand: wins as A (1), loses as B to A (0), then a tie and a win as B: (1 + 0 + 1/2 + 1) / 4
        ({"pairwise": True}, ["[[B]] no, [[A]]", "[[A]]", "[[C]]", "[[B]]"], 0.625),
    ],
)
def test_the_last_match_counts_and_several_texts_become_one_value(fields, texts, value):
    verdict = reader(judge(**fields))(Opinion("ok", texts=texts))
    assert (verdict.status, verdict.reward) == ("ok", pytest.approx(value))
    assert verdict.said == {"j": "\n\n---\n\n".join(texts)}


def test_what_cannot_be_read_is_invalid_and_its_text_kept():
    verdict = reader(judge())(Opinion("ok", texts=["I would rather not say."]))
    assert (verdict.status, verdict.reward, verdict.said) == ("invalid", None, {"j": "I would rather not say."})
    assert "rather not say" in verdict.error


def test_your_own_parse_is_called_and_what_it_raises_is_invalid(tmp_path):
    path = tmp_path / "parse.py"
    path.write_text("def parse(text):\n    return {'good': 1, 'nan': float('nan')}[text]\n")
    read = reader(judge(parse=f"{path}:parse"))
    assert read(Opinion("ok", texts=["good"])).reward == 1.0
    verdict = read(Opinion("ok", texts=["bad"]))
    assert verdict.status == "invalid"
    assert "KeyError: 'bad'" in verdict.error
    with pytest.raises(ConfigError, match="has no 'other'"):
        reader(judge(parse=f"{path}:other"))


def test_models_and_functions_are_one_weighted_sum(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("def length(solution_str):\n    return {'score': len(solution_str), 'chars': 3}\n")
    model = RewardTerm(judge=JudgeSpec(prompt="p.txt", url="http://judge/v1"), name="rm/x", weight=2.0)
    verdict = load_terms([RewardTerm(function=f"{path}:length", name="length", weight=0.5), model, judge()])
    asked = {"rm/x": Opinion("ok", texts=["score: 1.5"]), "j": Opinion("ok", texts=["score: -1"])}
    one = verdict(Sample("", "red", '""', "null", asked=asked))
    assert (one.reward, one.parts) == (0.5 * 3 + 2 * 1.5 - 1, {"length": 3.0, "length/chars": 3.0, "rm/x": 1.5, "j": -1.0})
    assert one.said == {"rm/x": "score: 1.5", "j": "score: -1"}
    late = verdict(Sample("", "red", '""', "null", asked={**asked, "j": Opinion("timeout", error="no answer")}))
    assert (late.status, late.reward, late.error) == ("timeout", None, "j: no answer")


def test_a_classifiers_answer_is_its_score():
    from asyncrl.config import ModelSpec

    read = reader(RewardTerm(model=ModelSpec(path="m"), name="rm"))
    assert read(Opinion("ok", -0.25)).reward == -0.25
    assert read(Opinion("invalid", error="9 tokens")).error == "9 tokens"


def test_a_prompt_without_the_response_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("Is {response_a} good?")
    with pytest.raises(ConfigError, match=r"p.txt' has no \{response\}"):
        read_prompt(JudgeSpec(prompt=str(tmp_path / "p.txt"), url="http://judge/v1"))
    with pytest.raises(ConfigError, match=r"has no \{response_b\}"):
        read_prompt(JudgeSpec(prompt=str(tmp_path / "p.txt"), url="http://judge/v1", pairwise=True))
    with pytest.raises(ConfigError, match="can't be read"):
        read_prompt(JudgeSpec(prompt=str(tmp_path / "none.txt"), url="http://judge/v1"))
