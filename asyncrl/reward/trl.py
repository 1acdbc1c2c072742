"""TRL's reward convention: `f(prompts, completions, **columns) -> list[float | None]`, called with lists of one.

As `GRPOTrainer` of TRL does (huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"): everything by keyword;
completions are texts or, where the prompt is chat messages, lists with one assistant message; every column of the dataset but
the prompt comes as a list too; `async def` is awaited. There is no `trainer_state`: rewards are scored apart from the learner.
A function that compares the members of a batch with each other sees one of them here.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from asyncrl.reward.frames import Sample

_OWN = ("prompts", "completions", "completion_ids")
_json = msgspec.json.Decoder()


def is_trl(function: Callable[..., Any]) -> bool:
    """Whether a parameter has a name that only TRL's convention knows, and none has verl's."""
    try:
        names = set(inspect.signature(function).parameters)
    except ValueError:
        return False
    return "solution_str" not in names and not names.isdisjoint(_OWN)


def trl_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[Sample], Any]:
    """What asks `function` about one sample: its one value, None where it says that it does not apply.

    The metrics that it logs through `log_metric` come with the value, in a dict with `score`. arguments: more keywords, passed
    as they are. Raises TypeError for a column that the row lacks, ValueError for an answer that is no list of one; and whatever
    the function raises.
    """
    parameters = inspect.signature(function).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p.name for p in parameters if p.name in known and p.default is p.empty]

    def ask(sample: Sample) -> Any:
        metrics: dict[str, Any] = {}
        values = {**_columns(sample), "log_extra": _ignore, "log_metric": metrics.__setitem__, **arguments}
        if missing := [name for name in required if name not in values]:
            raise TypeError(f"it takes {missing}, which the dataset row does not have; its columns are {sorted(values)}")
        result = awaited(function(**{name: value for name, value in values.items() if open_ended or name in known}))
        try:
            [value] = result
        except (TypeError, ValueError):
            raise ValueError(f"returned {result!r:.100} for one completion; expected a list of one number or None") from None
        return {**metrics, "score": value} if metrics and value is not None else value

    return ask


def awaited(result: Any) -> Any:
    """The result of a function, run to its end if it is an `async def`."""
    return asyncio.run(_await(result)) if inspect.isawaitable(result) else result


async def _await(result: Awaitable[Any]) -> Any:
    return await result


def _ignore(column: str, values: list[Any]) -> None:
    """`log_extra`: TRL's table of completions; here the replay log holds them all."""


def _columns(sample: Sample) -> dict[str, Any]:
    """What the row says, as TRL would pass it, each a list of one; and verl's three, where no column has their name."""
    record = _json.decode(sample.record)
    prompt = record.pop("prompt", None)
    record.pop("completion", None)  # a column of supervised data sets, which TRL does not pass either
    text = sample.solution_str
    verls = {
        "data_source": sample.data_source,
        "ground_truth": _json.decode(sample.ground_truth),
        "extra_info": _json.decode(sample.extra_info),
    }
    return {
        **{name: [value] for name, value in {**verls, **record}.items()},
        "prompts": [prompt],
        "completions": [[{"role": "assistant", "content": text}] if isinstance(prompt, list) else text],
        "completion_ids": [sample.response_ids],
    }
