"""What a reward function's answer means: the score that is due at the end, and what turns and tokens earn before it. Pure."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from asyncrl.reward.frames import Sample, Verdict

_NO_PARTS = ("score", "turn_rewards", "token_rewards")


def read_result(result: Any, sample: Sample) -> Verdict:
    """A finite number, or a dict with a finite `score` whose other finite numbers become parts. Else `invalid`.

    A text under `pred` is the answer that the function saw in the response, as verl's own verifiers return it. Lists under
    `turn_rewards` and `token_rewards` are what is earned beside the score: one number per turn, per token.
    """
    answer: str | None = None
    earned: list[float] | None = None
    if not isinstance(result, dict):
        score, parts = _number(result), {}
        shown = f"{type(result).__name__} {result!r}"
    elif "score" in result:
        score = _number(result["score"])
        numbers = ((str(name), _number(value)) for name, value in result.items() if name not in _NO_PARTS)
        parts = {name: value for name, value in numbers if value is not None and math.isfinite(value)}
        answer = pred if isinstance(pred := result.get("pred"), str) else None
        shown = f"score={result['score']!r}"
        try:
            earned = _token_rewards(result, len(sample.response_ids), sample.turns)
        except ValueError as error:
            return Verdict("invalid", error=str(error))
    else:
        return Verdict("invalid", error=f"returned a dict without 'score'; its keys are {sorted(map(str, result))}"[:500])
    if score is None:
        return Verdict("invalid", error=f"returned {shown}"[:400] + "; expected a finite number or a dict with 'score'")
    if not math.isfinite(score):
        return Verdict("invalid", error=f"returned {score}; expected a finite number")
    return Verdict("ok", score, parts, answer=answer, token_rewards=earned)


def _token_rewards(result: Mapping[str, Any], length: int, turns: Sequence[int]) -> list[float] | None:
    """What each of `length` response tokens, the stop token included, earns beside the score; None: nothing is said.

    A turn's reward is due at its last token; `turns` are the offsets where they start. Turns and tokens add up.
    """
    total: list[float] | None = None
    if result.get("turn_rewards") is not None:
        total = [0.0] * length
        for end, earned in zip([*turns[1:], length], _listed(result, "turn_rewards", len(turns), "turn"), strict=True):
            total[end - 1] += earned
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
    found: list[float] = []
    for place, value in enumerate(values):
        read = _number(value)
        if read is None or not math.isfinite(read):
            raise ValueError(f"returned {key}[{place}]={value!r:.100}; expected a finite number")
        found.append(read)
    return found


def _number(value: Any) -> float | None:
    """Python, numpy and zero-dimensional tensor numbers; a string is none."""
    if not isinstance(value, Real) and callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) else None
