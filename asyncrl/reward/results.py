"""What a reward function is asked about, and what its result means: the score, and turn- and token-level rewards. Pure."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from msgspec import Struct

from asyncrl.types import Purpose


class Opinion(Struct, frozen=True, array_like=True):
    """What a model said of a sample: a classifier a score, a judge texts. Only `ok` has them.

    Texts of a pairwise judge come in twos, one per other response of the group: with this one as A, and with it as B.
    """

    status: Literal["ok", "invalid", "timeout"]
    score: float | None = None
    texts: list[str] = []
    error: str = ""


class Sample(Struct, frozen=True, array_like=True):
    """One response to score. ground_truth, extra_info and record are JSON texts."""

    data_source: str
    solution_str: str
    ground_truth: str
    extra_info: str
    # An object: the dataset row by column, its prompt under "prompt". TRL's functions may ask for it.
    record: str = "{}"
    response_ids: list[int] = []  # the response's tokens, the stop token included
    turns: tuple[int, ...] = (0,)  # offsets in response_ids where turns start
    episode: str = "null"  # as types.Episode.for_rewards makes it; null: the response was a single turn
    group: int = 0  # equal for responses to one prompt
    asked: dict[str, Opinion] = {}  # what models said, by the name of their term
    purpose: Purpose = "train"


class Verdict(Struct, frozen=True, tag="verdict"):
    """What became of one sample. Only `ok` carries a reward."""

    status: Literal["ok", "invalid", "timeout"]
    reward: float | None = None
    parts: dict[str, float] = {}  # the other numbers that the function returned, by name
    error: str = ""
    # What the function took out of the response as its answer (`pred` in its dict); majority votes count these.
    answer: str | None = None
    token_rewards: list[float] | None = None  # one per response token, beside the reward; None: nothing was said
    said: dict[str, str] = {}  # what judges wrote, by the name of their term
    # Which process of the pool scored it, from when to when (seconds since the epoch): set where the verdict is received.
    scoring: tuple[int, float, float] | None = None


_SCORE = "a finite number or a dict with 'score'"
_NO_PARTS = ("score", "turn_rewards", "token_rewards")


def read_result(result: Any, sample: Sample) -> Verdict:
    """A finite number, or a dict with a finite `score` whose other finite numbers become parts. Else `invalid`.

    A text under `pred` is the answer that the function saw in the response, as verl's own verifiers return it. Lists under
    `turn_rewards` and `token_rewards` come beside the score: one number per turn, one per token.
    """
    try:
        if not isinstance(result, dict):
            return Verdict("ok", _finite(result, f"{type(result).__name__} {result!r}", _SCORE))
        if "score" not in result:
            raise ValueError(f"returned a dict without 'score'; its keys are {sorted(map(str, result))}"[:500])
        score = _finite(result["score"], f"score={result['score']!r}", _SCORE)
        token_rewards = _token_rewards(result, len(sample.response_ids), sample.turns)
    except ValueError as error:
        return Verdict("invalid", error=str(error))
    numbers = ((str(name), _number(value)) for name, value in result.items() if name not in _NO_PARTS)
    parts = {name: value for name, value in numbers if value is not None and math.isfinite(value)}
    answer = pred if isinstance(pred := result.get("pred"), str) else None
    return Verdict("ok", score, parts, answer=answer, token_rewards=token_rewards)


def _finite(value: Any, shown: str, expected: str) -> float:
    """Raises ValueError for what is no finite number."""
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"returned {shown}"[:400] + f"; expected {expected}")
    return number


def _token_rewards(result: Mapping[str, Any], length: int, turns: Sequence[int]) -> list[float] | None:
    """The rewards of `length` response tokens, the stop token included, beside the score; None: the result has none.

    A turn's reward is assigned to its last token; `turns` are the offsets where they start. Turns and tokens add up.
    """
    total: list[float] | None = None
    if result.get("turn_rewards") is not None:
        total = [0.0] * length
        for end, reward in zip([*turns[1:], length], _listed(result, "turn_rewards", len(turns), "turn"), strict=True):
            total[end - 1] += reward
    if result.get("token_rewards") is not None:
        single = _listed(result, "token_rewards", length, "response token")
        total = single if total is None else [a + b for a, b in zip(total, single, strict=True)]
    return total


def _listed(result: Mapping[str, Any], key: str, count: int, of_what: str) -> list[float]:
    """Raises ValueError for what is no list of `count` finite numbers."""
    try:
        values = list(result[key])
    except TypeError:
        raise ValueError(f"returned {key}={result[key]!r:.100}; expected a list of {count}, one per {of_what}") from None
    if len(values) != count:
        raise ValueError(f"returned {len(values)} {key}; expected {count}, one per {of_what}")
    return [_finite(value, f"{key}[{place}]={value!r:.100}", "a finite number") for place, value in enumerate(values)]


def _number(value: Any) -> float | None:
    """Python, numpy and zero-dimensional tensor numbers; a string is none."""
    if not isinstance(value, Real) and callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) else None
