"""How a user's reward function is called, by verl's convention or TRL's (reward/trl.py). What it answers: reward/results.py."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from asyncrl.callables import describe, load_callable
from asyncrl.config import RewardStyle
from asyncrl.errors import ConfigError
from asyncrl.reward.frames import Sample, Verdict
from asyncrl.reward.results import read_result
from asyncrl.reward.trl import awaited, is_trl, trl_call

_NAMES = ("data_source", "solution_str", "ground_truth", "extra_info")
_EXTRA_NAMES = ("response_ids", "turns")  # for functions that reward tokens or turns; given to those that name them
_json = msgspec.json.Decoder()

Judge = Callable[[Sample], Verdict]


def load_judge(reference: str, style: RewardStyle = "auto", arguments: Mapping[str, Any] | None = None) -> Judge:
    """Loads the reward function and returns what turns a sample into a verdict. Raises ConfigError.

    A function may carry an attribute `warm_up`, called here: slow imports in it cost no sample its deadline.
    """
    function = load_callable(reference, "reward.function")
    getattr(function, "warm_up", lambda: None)()
    return judge(function, reference, style, arguments)


def judge(
    function: Callable[..., Any],
    reference: str = "reward.function",
    style: RewardStyle = "auto",
    arguments: Mapping[str, Any] | None = None,
) -> Judge:
    """Wraps a reward function: whatever it raises becomes `invalid` with the error's text, never a silent 0.

    `ok` without a reward: a function of TRL's kind says that it does not apply. arguments: more keywords for every call.
    """
    is_of_trl = style == "trl" or (style == "auto" and is_trl(function))
    ask = trl_call(function, arguments or {}) if is_of_trl else _verl_call(function, reference, arguments or {})

    def verdict(sample: Sample) -> Verdict:
        try:
            value = ask(sample)
            return Verdict("ok") if value is None and is_of_trl else read_result(value, sample)
        except BaseException as error:  # sys.exit in a user's function must cost one sample, not the process
            return Verdict("invalid", error=describe(error))

    return verdict


def _verl_call(function: Callable[..., Any], reference: str, arguments: Mapping[str, Any]) -> Callable[[Sample], Any]:
    keywords, positional = _convention(partial(function, **arguments), reference, arguments)

    def ask(sample: Sample) -> Any:
        values = {
            "data_source": sample.data_source,
            "solution_str": sample.solution_str,
            "ground_truth": _json.decode(sample.ground_truth),
            "extra_info": _json.decode(sample.extra_info),
            "response_ids": sample.response_ids,
            "turns": sample.turns,
        }
        if positional:
            positions = [values[name] for name in _NAMES[:positional]]
            return awaited(function(*positions, **{name: values[name] for name in keywords}, **arguments))
        return awaited(function(**{name: values[name] for name in keywords}, **arguments))

    return ask


def _convention(function: Callable[..., Any], reference: str, arguments: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """(names to pass by keyword, how many of the four by position): none, but where the parameters have other names.

    A function may take fewer than the four, as verl's own `gsm8k.compute_score(solution_str, ground_truth, …)` does. Beside
    them it may name `response_ids`, the response's tokens, and `turns`, the offsets in them where turns start.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a compiled function that doesn't tell
        return _NAMES, 0
    parameters = signature.parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    keywords = tuple(name for name in _NAMES if open_ended or name in by_name)
    # others must not be handed on by a `**kwargs`, nor where the recipe gives an argument of that name
    extra = tuple(name for name in _EXTRA_NAMES if name in by_name and name not in arguments)
    if "solution_str" in keywords and _binds(signature, **dict.fromkeys(keywords + extra)):
        return keywords + extra, 0
    for count in (4, 3):
        if _binds(signature, *_NAMES[:count], **dict.fromkeys(extra)):
            return extra, count
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
