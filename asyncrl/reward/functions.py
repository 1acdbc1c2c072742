"""verl's reward convention: how a user's function is called, and what its answer means."""

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import msgspec

from asyncrl.callables import describe, load_callable
from asyncrl.errors import ConfigError
from asyncrl.reward.frames import Sample, Verdict

_NAMES = ("data_source", "solution_str", "ground_truth", "extra_info")
_json = msgspec.json.Decoder()

Judge = Callable[[Sample], Verdict]


def load_judge(reference: str) -> Judge:
    """Loads the reward function and returns what turns a sample into a verdict. Raises ConfigError."""
    return judge(load_callable(reference, "reward.function"), reference)


def judge(function: Callable[..., Any], reference: str = "reward.function") -> Judge:
    """Wraps a reward function: whatever it raises becomes `invalid` with the error's text, never a silent 0."""
    keywords, positional = _convention(function, reference)

    def verdict(sample: Sample) -> Verdict:
        try:
            values = {
                "data_source": sample.data_source,
                "solution_str": sample.solution_str,
                "ground_truth": _json.decode(sample.ground_truth),
                "extra_info": _json.decode(sample.extra_info),
            }
            if positional:
                return read_result(function(*[values[name] for name in _NAMES[:positional]]))
            return read_result(function(**{name: values[name] for name in keywords}))
        except BaseException as error:  # sys.exit in a user's function must cost one sample, not the process
            return Verdict("invalid", error=describe(error))

    return verdict


def _convention(function: Callable[..., Any], reference: str) -> tuple[tuple[str, ...], int]:
    """(names to pass by keyword, 0), or ((), number of positional arguments) where the parameters have other names.

    A function may take fewer than the four, as verl's own `gsm8k.compute_score(solution_str, ground_truth, …)` does.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a compiled function that doesn't tell
        return _NAMES, 0
    parameters = signature.parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    keywords = tuple(name for name in _NAMES if open_ended or name in by_name)
    if "solution_str" in keywords and _binds(signature, **dict.fromkeys(keywords)):
        return keywords, 0
    for count in (4, 3):
        if _binds(signature, *_NAMES[:count]):
            return (), count
    raise ConfigError(
        f"reward.function={reference!r} takes {signature}, but is called as "
        f"({', '.join(_NAMES)}); rename its parameters, or give the others defaults"
    )


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def read_result(result: Any) -> Verdict:
    """A finite number, or a dict with a finite `score` whose other finite numbers become parts. Else `invalid`."""
    if not isinstance(result, dict):
        score, parts = _number(result), {}
        shown = f"{type(result).__name__} {result!r}"
    elif "score" in result:
        score = _number(result["score"])
        numbers = ((str(name), _number(value)) for name, value in result.items() if name != "score")
        parts = {name: value for name, value in numbers if value is not None and math.isfinite(value)}
        shown = f"score={result['score']!r}"
    else:
        return Verdict("invalid", error=f"returned a dict without 'score'; its keys are {sorted(map(str, result))}"[:500])
    if score is None:
        return Verdict("invalid", error=f"returned {shown}"[:400] + "; expected a finite number or a dict with 'score'")
    if not math.isfinite(score):
        return Verdict("invalid", error=f"returned {score}; expected a finite number")
    return Verdict("ok", score, parts)


def _number(value: Any) -> float | None:
    """Python, numpy and zero-dimensional tensor numbers; a string is none."""
    if not isinstance(value, Real) and callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) else None
