import json
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.reward import verify
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def score(function, response, truth, **arguments):
    return function("test", response, truth, None, **arguments)


@pytest.mark.parametrize(
    ("response", "truth", "right", "answer"),
    [
        ("so\n#### 1,172", "1172", 1.0, "1172"),
        ("5 + 7 = 12\n#### 12", "a * b = <<3*4=12>>12\n#### 12", 1.0, "12"),  # GSM8K's own answer
        ("3 apples.\n#### 72 apples", 72, 1.0, "72"),
        ("#### $1,172.50", "1172.5", 1.0, "2345/2"),
        ("#### -3", "-3", 1.0, "-3"),
        ("#### 71", "72", 0.0, "71"),
        ("#### 41\n\nLet me double check: 3*9=27", "41", 1.0, "41"),  # the first number after the mark, whatever follows
        ("#### 12 hours and 30 minutes", "12", 1.0, "12"),
        ("#### \u22127", "-7", 1.0, "-7"),  # a typographic minus
        ("#### -$7", "\u22127", 1.0, "-7"),
        ("#### $1,234.50", "1234.5", 1.0, "2469/2"),
        ("#### 25%", "25", 1.0, "25"),
        ("#### 72.", "72", 1.0, "72"),
        (r"#### \(\boxed{1{,}172}\)", "1172", 1.0, "1172"),
        (r"#### \$\frac{1}{2}", "0.5", 1.0, "1/2"),
        ("#### 10-3 is 7", "10", 1.0, "10"),
        ("#### 1e3", "1000", 1.0, "1000"),
        ("```python\n#### 5 steps\nprint(41)\n```\n#### 41", "41", 1.0, "41"),  # the last mark, code or not
        ("#### 41\n#### done", "41", 1.0, "41"),  # a mark that no number follows is none
        ("#### 3, no: #### 4", "3", 0.0, "4"),
        ("####", "72", 0.0, None),
        (r"#### 2\frac{1}{2}", "2.5", 1.0, "5/2"),
        (r"#### \frac{-1,000}{2}", "-500", 1.0, "-500"),
        (r"#### 10,\!000", "10000", 1.0, "10000"),
        ("#### " + "9" * 4000 + "e999", "72", 0.0, None),  # no number that anybody means
        ("the answer is 72.", "72", 1.0, "72"),
        (r"\boxed{5}, and $6$, so 72 apples", "72", 1.0, "72"),  # the last number, whatever is set apart before it
        ("from 3-7", "7", 1.0, "7"),
        ("it is 1/0", "1", 0.0, None),
        ("9" * 5000, "9", 0.0, None),
        ("no idea", "72", 0.0, None),
    ],
)
def test_gsm8k(response, truth, right, answer):
    assert score(verify.gsm8k, response, truth) == {"score": right, "pred": answer}


WORDS = st.text(st.characters(categories=["L", "Z", "P"], exclude_characters="#$€£-\u2212\u2013\ufe63\uff0d,./\\"), max_size=20)


@given(
    st.integers(-(10**9), 10**9),
    st.integers(0, 99),
    st.sampled_from(
        ["{sign}{digits}", "{sign}${digits}", "${sign}{digits}", "**{sign}{digits}**", " {sign}{digits}%", "{sign}{digits}."]
    ),
    st.sampled_from("-\u2212"),
    st.text(max_size=40),
    WORDS,
    st.text(max_size=40),
)
def test_any_way_to_write_a_number_is_read_after_the_mark_and_at_the_end(whole, cents, style, minus, before, words, after):
    value = Fraction(abs(whole) * 100 + cents, 100) * (-1 if whole < 0 else 1)
    written = style.format(sign=minus if whole < 0 else "", digits=f"{abs(whole):,}" + (f".{cents:02}" if cents else ""))
    assert score(verify.gsm8k, f"{before}\n#### {written} {words} {after.replace('#', '')}", str(value))["score"] == 1.0
    assert score(verify.gsm8k, f"{before.replace('#', '')} {written} {words}", str(value))["score"] == 1.0


def test_a_ground_truth_without_a_number_is_no_wrong_answer():
    with pytest.raises(ValueError, match="ground truth 'seven' holds no number"):
        score(verify.gsm8k, "#### 7", "seven")


@pytest.mark.parametrize(
    ("response", "truth", "right", "answer"),
    [
        (r"thus $\boxed{\frac12}$.", "0.5", 1.0, "1/2"),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0, "x^2+2x+1"),
        (r"\boxed{4}, no: \boxed{3}", "3", 1.0, "3"),
        (r"\boxed{3}, no: \boxed{4}", "3", 0.0, "4"),
        (r"$(1,2)$", r"we see $\boxed{(1, 2)}$ at once", 1.0, "(1,2)"),
        (r"The answer is $\frac{1}{3}$.", r"$\frac{1}{3}$", 1.0, "1/3"),
        (r"\boxed{\text{west}}", r"\text{east}", 0.0, r"\text{west}"),
        ("nothing here", "3", 0.0, None),
    ],
)
def test_math(response, truth, right, answer):
    pytest.importorskip("math_verify")
    assert score(verify.math, response, truth) == {"score": right, "pred": answer}


def test_a_ground_truth_that_cannot_be_read_is_no_wrong_answer():
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="holds no mathematical expression"):
        score(verify.math, r"\boxed{3}", "")


def test_it_needs_no_main_thread():
    pytest.importorskip("math_verify")
    results = []
    thread = threading.Thread(target=lambda: results.append(score(verify.math, r"\boxed{\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join(20)
    assert results == [{"score": 1.0, "pred": "1/2"}]


def test_an_answer_that_never_ends_costs_its_own_sample_only():
    pytest.importorskip("math_verify")
    endless, easy = (Sample("m", text, '"3"', "null") for text in (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}"))
    with RewardPool[int]("asyncrl.reward.verify:math", deadline_s=3.0) as pool:
        verdicts = pool.map([endless, easy])
    assert [(verdict.status, verdict.reward) for verdict in verdicts] == [("timeout", None), ("ok", 1.0)]


@pytest.mark.parametrize(
    ("module", "function", "fix"),
    [
        ("math_verify", "math", "pip install 'asyncrl[math]'"),
        ("jsonschema", "json_schema", "pip install jsonschema"),
    ],
)
def test_a_missing_library_is_known_before_the_first_sample(module, function, fix):
    program = f"""
import sys
sys.modules[{module!r}] = None
from asyncrl.errors import ConfigError
from asyncrl.config import RewardTerm
from asyncrl.reward.functions import load_judge
load_judge(RewardTerm(function="asyncrl.reward.verify:exact_match"))
try:
    load_judge(RewardTerm(function="asyncrl.reward.verify:{function}"))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert fix in done.stdout


def test_exact_match():
    assert score(verify.exact_match, " Paris\n", "Paris") == {"score": 1.0, "pred": "Paris"}
    assert score(verify.exact_match, "paris", "Paris")["score"] == 0.0
    assert score(verify.exact_match, "paris", "Paris", ignore_case=True) == {"score": 1.0, "pred": "paris"}
    assert score(verify.exact_match, "12", 12)["score"] == 1.0
    assert score(verify.exact_match, "b", ["a", "b"])["score"] == 1.0


def test_regex():
    assert score(verify.regex, "<think>\nhm\n</think> 4", "^<think>.*</think>") == {"score": 1.0}
    assert score(verify.regex, "4", "^<think>") == {"score": 0.0}
    assert score(verify.regex, "4", "ignored", pattern=r"^\d$") == {"score": 1.0}


def test_regex_answer():
    pattern = r"Answer: ?(\w+)"
    assert score(verify.regex_answer, "Answer: 3. No, Answer: 4", 4, pattern=pattern) == {"score": 1.0, "pred": "4"}
    assert score(verify.regex_answer, "Answer: 3", "4", pattern=pattern) == {"score": 0.0, "pred": "3"}
    assert score(verify.regex_answer, "4", "4", pattern=pattern) == {"score": 0.0, "pred": None}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ('{"a": 3}', 1.0),
        ('{"a": "3"}', 0.0),
        ("{}", 0.0),
        ("a = 3", 0.0),
        ('```json\n{"a": "x"}\n```\nbetter:\n```json\n{"a": 1}\n```', 1.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schema(response, right):
    pytest.importorskip("jsonschema")
    assert score(verify.json_schema, response, SCHEMA)["score"] == right
    assert score(verify.json_schema, response, json.dumps(SCHEMA))["score"] == right
    assert verify.json_schema("test", response, None, {"schema": SCHEMA})["score"] == right


def test_a_wrong_schema_is_no_wrong_answer():
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.SchemaError):
        score(verify.json_schema, "{}", {"type": "objekt"})


def test_what_an_episode_earned_in_all_or_turn_by_turn():
    told = {"parts": {"n": 2.0}, "reward": 1.75, "turn_rewards": [0.5, 0.25, 1.0], "purpose": "train"}
    assert verify.episode("", told) == {"n": 2.0, "score": 1.75}
    assert verify.episode("", told, by_turn=True) == {"n": 2.0, "score": 1.0, "turn_rewards": [0.5, 0.25, 0.0]}
    assert verify.episode("", told | {"purpose": "eval"}, by_turn=True)["score"] == 1.75  # evaluations count no turns
    with pytest.raises(ValueError, match="leave it out"):
        verify.episode("", told | {"turn_rewards": None}, by_turn=True)
