"""How users' reward functions are called, one or several weighted ones, by verl's convention or TRL's.

A judge takes a sample and returns a verdict; `load_terms` makes the judge of a recipe. What functions return: results.py.
Models were asked before (asking.py): their answers come with the sample, and are read here, too (opinions.py).
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from asyncrl.config import RewardTerm
from asyncrl.config.callables import describe, load_callable, named_parameters
from asyncrl.errors import ConfigError
from asyncrl.reward.opinions import reader
from asyncrl.reward.results import Sample, Verdict, read_result

Judge = Callable[[Sample], Verdict]

_json = msgspec.json.Decoder()


# ------------------------------------------------------------------------------------------- weighted sums


def load_terms(terms: Sequence[RewardTerm]) -> Judge:
    """Loads every function of `RewardSpec.terms()`. Raises ConfigError."""
    judges = [load_judge(term) for term in terms]
    return alone(judges[0]) if not terms[0].name else weighted(terms, judges)


def alone(judge: Judge) -> Judge:
    """One function, whose parts keep their names. Where it does not apply, nothing does: the sample is `invalid`."""
    return lambda sample: _applied(judge(sample))


def weighted(terms: Sequence[RewardTerm], judges: Sequence[Judge]) -> Judge:
    """The weighted sum of the rewards that apply to a sample, as in TRL (`reward_weights`, None left out).

    Parts: each reward's unweighted value under the term's name, and its own parts under `name/part`. One failure makes the
    sample `invalid`: a sum that lacks a reward would be another reward. The answer is that of the first term that has one.
    Token rewards are summed by the same weights.
    """

    def verdict(sample: Sample) -> Verdict:
        total: float | None = None
        parts: dict[str, float] = {}
        answer: str | None = None
        token_rewards: list[float] | None = None
        said: dict[str, str] = {}
        for term, judge in zip(terms, judges, strict=True):
            one = judge(sample)
            said |= one.said
            if one.status != "ok":
                return Verdict(one.status, error=f"{term.name}: {one.error}", said=said)
            if one.reward is None:
                continue
            total = (total or 0.0) + term.weight * one.reward
            parts[term.name] = one.reward
            parts |= {f"{term.name}/{part}": value for part, value in one.parts.items()}
            answer = one.answer if answer is None else answer
            if one.token_rewards is not None:
                before = token_rewards or [0.0] * len(one.token_rewards)
                token_rewards = [sum_ + term.weight * more for sum_, more in zip(before, one.token_rewards, strict=True)]
        return _applied(Verdict("ok", total, parts, answer=answer, token_rewards=token_rewards, said=said))

    return verdict


def _applied(verdict: Verdict) -> Verdict:
    if verdict.status != "ok" or verdict.reward is not None:
        return verdict
    return Verdict("invalid", error="no reward function applies to this sample: each returned None for it")


# -------------------------------------------------------------------------------------------- one function


def load_judge(term: RewardTerm) -> Judge:
    """Loads the reward function and returns what turns a sample into a verdict. Raises ConfigError.

    A function may carry an attribute `warm_up`, called here: slow imports in it cost no sample its deadline. Of a model: what
    reads its answer.
    """
    if not term.function:
        read = reader(term)
        return lambda sample: read(sample.asked[term.name])
    function = load_callable(term.function, "reward.function")
    getattr(function, "warm_up", lambda: None)()
    return judge(function, term)


def judge(function: Callable[..., Any], term: RewardTerm) -> Judge:
    """Wraps a reward function: whatever it raises becomes `invalid` with the error's text, never a silent 0.

    `ok` without a reward: a function of TRL's kind says that it does not apply.
    """
    of_trl = term.style == "trl" or (term.style == "auto" and is_trl(function))
    ask = _trl_call(function, term.arguments) if of_trl else _verl_call(function, term)

    def verdict(sample: Sample) -> Verdict:
        try:
            value = ask(sample)
            return Verdict("ok") if value is None and of_trl else read_result(value, sample)
        except BaseException as error:  # sys.exit in a user's function must cost one sample, not the process
            return Verdict("invalid", error=describe(error, function.__module__))

    return verdict


def _awaited(result: Any) -> Any:
    """The result of a function, run to its end if it is an `async def`."""

    async def wait(result: Awaitable[Any]) -> Any:
        return await result

    return asyncio.run(wait(result)) if inspect.isawaitable(result) else result


# ---------------------------------------------------------------------------------------- verl's convention

_NAMES = ("data_source", "solution_str", "ground_truth", "extra_info")
_EXTRA_NAMES = ("response_ids", "turns", "episode")  # given to functions that name them


def _verl_call(function: Callable[..., Any], term: RewardTerm) -> Callable[[Sample], Any]:
    keywords, positional = _verl_arguments(partial(function, **term.arguments), term)

    def ask(sample: Sample) -> Any:
        values = {name: getattr(sample, name) for name in (*_NAMES, *_EXTRA_NAMES)}
        values |= {name: _json.decode(values[name]) for name in ("ground_truth", "extra_info", "episode")}
        positions = [values[name] for name in _NAMES[:positional]]
        return _awaited(function(*positions, **{name: values[name] for name in keywords}, **term.arguments))

    return ask


def _verl_arguments(function: Callable[..., Any], term: RewardTerm) -> tuple[tuple[str, ...], int]:
    """(names to pass by keyword, how many of the four to pass by position, where the parameters have other names).

    A function may take fewer than the four, as verl's own `gsm8k.compute_score(solution_str, ground_truth, …)` does. Beside
    them it may name `response_ids`, the response's tokens, `turns`, the offsets in them where turns start, and `episode`: a
    dict of what its environment said (reward, turn_rewards, parts, stop, messages, figures, purpose), None for a single turn.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a compiled function that doesn't tell
        return _NAMES, 0
    named, open_ended = named_parameters(signature)
    keywords = tuple(name for name in _NAMES if open_ended or name in named)
    # others must not be handed on by a `**kwargs`, nor where the recipe gives an argument of that name
    extra = tuple(name for name in _EXTRA_NAMES if name in named and name not in term.arguments)
    if "solution_str" in keywords and _binds(signature, **dict.fromkeys(keywords + extra)):
        return keywords + extra, 0
    for count in (4, 3):
        if _binds(signature, *_NAMES[:count], **dict.fromkeys(extra)):
            return extra, count
    raise ConfigError(
        f"reward.function={term.function!r} takes {signature}, but is called as "
        f"({', '.join(_NAMES)}); rename its parameters, or give the others defaults"
    )


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


# ----------------------------------------------------------------------------------------- TRL's convention
# `f(prompts, completions, **columns) -> list[float | None]`, called with lists of one, as `GRPOTrainer` of TRL does
# (huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"): everything by keyword; completions are texts or,
# where the prompt is chat messages, lists with one assistant message; every column of the dataset but the prompt comes as a
# list too; `async def` is awaited. There is no `trainer_state`: rewards are scored apart from the learner. A function that
# compares the members of a batch with each other sees one of them here.

_OWN = ("prompts", "completions", "completion_ids")


def is_trl(function: Callable[..., Any]) -> bool:
    """Whether a parameter has a name that only TRL's convention knows, and none has verl's."""
    try:
        names = set(inspect.signature(function).parameters)
    except ValueError:
        return False
    return "solution_str" not in names and not names.isdisjoint(_OWN)


def _trl_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[Sample], Any]:
    """What asks `function` about one sample: its one value, None where it says that it does not apply.

    The metrics that it logs through `log_metric` come with the value, in a dict with `score`. arguments: more keywords, passed
    as they are. Raises TypeError for a column that the row lacks, ValueError for a result that is no list of one; and whatever
    the function raises.
    """
    named, open_ended = named_parameters(inspect.signature(function))
    required = [name for name, parameter in named.items() if parameter.default is parameter.empty]

    def ask(sample: Sample) -> Any:
        metrics: dict[str, Any] = {}
        # log_extra fills TRL's table of completions; here the replay log holds them all
        loggers = {"log_extra": lambda column, values: None, "log_metric": metrics.__setitem__}
        values = {**_columns(sample), **loggers, **arguments}
        if missing := [name for name in required if name not in values]:
            raise TypeError(f"it takes {missing}, which the dataset row does not have; its columns are {sorted(values)}")
        result = _awaited(function(**{name: value for name, value in values.items() if open_ended or name in named}))
        try:
            [value] = result
        except (TypeError, ValueError):
            raise ValueError(f"returned {result!r:.100} for one completion; expected a list of one number or None") from None
        return {**metrics, "score": value} if metrics and value is not None else value

    return ask


def _columns(sample: Sample) -> dict[str, Any]:
    """What the row says, as TRL would pass it, each a list of one; and verl's three, where no column has their name."""
    record = _json.decode(sample.record)
    prompt = record.pop("prompt", None)
    record.pop("completion", None)  # a column of supervised data sets, which TRL does not pass either
    text = sample.solution_str
    columns = {
        "data_source": sample.data_source,
        "ground_truth": _json.decode(sample.ground_truth),
        "extra_info": _json.decode(sample.extra_info),
        **record,
    }
    return {
        **{name: [value] for name, value in columns.items()},
        "prompts": [prompt],
        "completions": [[{"role": "assistant", "content": text}] if isinstance(prompt, list) else text],
        "completion_ids": [sample.response_ids],
    }
