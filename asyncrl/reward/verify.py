"""Built-in verifiers to name in a recipe, e.g. `reward.function=asyncrl.reward.verify:gsm8k`: 1 for a right answer, else 0.

All take verl's `compute_score` parameters and return `{"score", "pred"}`, pred being the answer as read: majority votes count
it. Numbers are compared exactly. Answers in mathematics are read and compared by math-verify (Hugging Face; `pip install
'asyncrl[math]'`), JSON is checked by jsonschema. None has a clock of its own: math-verify's uses SIGALRM, which works in a main
thread only and turns a timeout into "wrong". Here the scoring process has a deadline (`reward.deadline_s`), past which the
sample is `timeout`.
"""

import importlib
import json
import logging
import re
from collections.abc import Mapping
from fractions import Fraction
from types import ModuleType
from typing import Any

from asyncrl.errors import ConfigError

Result = dict[str, Any]

_FENCED = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL)
_FRACTION = re.compile(r"(\d{0,20})\s{0,2}\\[dt]?frac\s*{\s*(-?[\d,]{1,20})\s*}\s*{\s*([\d,]{1,20})\s*}")
_DIGITS = 1000  # of a number at the most: longer ones are nonsense
_CURRENCY = re.compile(r"(?<!\d)\\?[$€£]\s?(?=[-.\d])")
# A minus (not the dash of 3-7), digits in one piece or in groups by commas, decimals; an exponent, or a denominator.
_NUMBER = re.compile(
    r"(?:(?<![\w.)}%])-)?(?:(?:\d{1,3}(?:,\d{2,3}){0,20},\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d)|/\d+)?"
)


def _library(module: str, *, needed_by: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{needed_by}, which can't be imported ({error}); pip install {package}") from error


def _math_verify() -> ModuleType:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once per process that its own clock is off
    return _library("math_verify", needed_by="the verifier math needs math-verify", package="'asyncrl[math]'")


def _jsonschema() -> ModuleType:
    return _library("jsonschema", needed_by="the verifier json_schema needs jsonschema", package="jsonschema")


def gsm8k(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> Result:
    """GSM8K (Cobbe et al. 2021): the first number after the last `####` that has one, else the last number of all.

    A number may have a sign, a currency, commas between its digits, decimals, an exponent, or be a fraction; units and percent
    signs don't count. ground_truth: the number, or GSM8K's whole answer with its `####`. Raises ValueError where it has none.
    """
    truth = _final_number(str(ground_truth))
    if truth is None:
        raise ValueError(f"the ground truth {str(ground_truth)[:200]!r} holds no number")
    answer = _final_number(solution_str)
    return {"score": float(answer == truth), "pred": None if answer is None else str(answer)}


def math(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> Result:
    r"""MATH (Hendrycks et al. 2021): the last `\boxed{}` of a response, else its last formula, equal as mathematics.

    ground_truth: the answer in LaTeX, or a whole solution that holds it as `\boxed{}` or between dollars.
    """
    gold = str(ground_truth)
    gold = gold if "\\boxed" in gold or "$" in gold else f"\\boxed{{{gold}}}"
    return _compare(_last_box(gold), _last_box(solution_str))


def exact_match(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, ignore_case: bool = False
) -> Result:
    """The whole response, blanks around it aside, is the ground truth, or one of them where it is a list."""
    answer = _folded(solution_str, ignore_case)
    accepted = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    return {"score": float(answer in {_folded(str(one), ignore_case) for one in accepted}), "pred": answer}


def regex(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, pattern: str = "") -> Result:
    """Whether the pattern occurs in the response; `.` matches newlines too. pattern empty: the ground truth is the pattern."""
    found = re.search(pattern or str(ground_truth), solution_str, re.DOTALL)
    return {"score": float(found is not None)}


def regex_answer(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, *, pattern: str) -> Result:
    """The first group of the pattern's last occurrence in the response, blanks aside, is the ground truth."""
    answer = next((found[1].strip() for found in reversed(list(re.finditer(pattern, solution_str, re.DOTALL)))), None)
    return {"score": float(answer is not None and answer == str(ground_truth).strip()), "pred": answer}


def json_schema(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> Result:
    """Whether the response, or its last fenced block, is JSON that fits the schema.

    The schema, an object or its text, is the ground truth or, failing that, `schema` in extra_info.
    """
    schema = (extra_info or {})["schema"] if ground_truth is None else ground_truth
    schema = json.loads(schema) if isinstance(schema, str) else schema
    validator = _jsonschema().validators.validator_for(schema)
    validator.check_schema(schema)  # a wrong schema is the data's fault, not the response's: it raises
    blocks = _FENCED.findall(solution_str)
    try:
        value = json.loads(blocks[-1] if blocks else solution_str)
    except (ValueError, RecursionError):
        return {"score": 0.0}
    return {"score": float(validator(schema).is_valid(value)), "pred": json.dumps(value, sort_keys=True)}


# `warm_up` (reward/functions.py): a missing library is known, and imported, before the first sample.
math.warm_up = _math_verify  # type: ignore[attr-defined]
json_schema.warm_up = _jsonschema  # type: ignore[attr-defined]


def _ratio(fraction: re.Match[str]) -> str:
    """A fraction of LaTeX, or a mixed number, as a ratio of two numbers."""
    whole, top, bottom = (part.replace(",", "") for part in fraction.groups())
    if not (top.strip("-") and bottom):
        return fraction[0]
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}" if whole else f"{top}/{bottom}"


def _final_number(text: str) -> Fraction | None:
    """As `gsm8k` says; None where there is none, or what can't be one (a denominator of 0, thousands of digits)."""
    text = re.sub("[\u2212\u2013\ufe63\uff0d]", "-", text).replace("{,}", ",").replace("\\,", ",").replace("\\!", "")
    text = _CURRENCY.sub("", _FRACTION.sub(_ratio, text))
    marked = (_NUMBER.search(part) for part in reversed(text.split("####")[1:]))
    found = next(filter(None, marked), None) or next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None or len(found[0]) > _DIGITS:
        return None
    numerator, _, denominator = found[0].replace(",", "").partition("/")
    try:
        return Fraction(numerator) / int(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None


def episode(solution_str: str, episode: Mapping[str, Any], by_turn: bool = False) -> Result:
    """What an episode's environment gave: the sum of its steps' rewards, and their named parts.

    by_turn: of training rollouts each step's reward stands at the end of its own turn, which tells estimators at token level
    what it was for; the score is that of the last.
    """
    if not by_turn or episode["purpose"] == "eval":
        return {**episode["parts"], "score": episode["reward"]}
    if episode["turn_rewards"] is None:
        raise ValueError("by_turn=True of an episode whose turns have no rewards of their own, as an agent's: leave it out")
    *earlier, last = episode["turn_rewards"]
    return {**episode["parts"], "score": last, "turn_rewards": [*earlier, 0.0]}


def _last_box(text: str) -> str:
    """From the last box on: of several, math-verify would make one answer, a set."""
    return text[max(text.rfind("\\boxed"), 0) :]


def _folded(text: str, ignore_case: bool) -> str:
    return text.strip().casefold() if ignore_case else text.strip()


def _compare(gold: str, response: str) -> Result:
    """By math-verify. Raises ValueError for a ground truth that it can't read: that is no wrong answer."""
    library = _math_verify()
    truth = library.parse(gold, parsing_timeout=None)
    if not truth:
        raise ValueError(f"the ground truth {gold[:200]!r} holds no mathematical expression")
    answer = library.parse(response, parsing_timeout=None)
    score = float(library.verify(truth, answer, timeout_seconds=None))
    return {"score": score, "pred": _written(answer)}


def _written(answer: list[Any]) -> str | None:
    """How an answer is written, so that 0.5 and 1/2 are one: numbers as fractions, all else as in the response."""
    if not answer:
        return None
    value, text = answer[0], str(answer[-1])
    if getattr(value, "is_Float", False) or getattr(value, "is_Rational", False):
        import sympy

        return str(sympy.Rational(str(value)))
    return re.sub(r"\s+", "", text)
