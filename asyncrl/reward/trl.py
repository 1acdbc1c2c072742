"""TRL's reward convention: `f(prompts, completions, **columns) -> list[float | None]`, called with lists of one.

As `GRPOTrainer` of TRL does (huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"): everything by keyword;
completions are texts or, where the prompt is chat messages, lists with one assistant message; every column of the dataset but
the prompt comes as a list too. A function that compares the members of a batch with each other sees one of them here.
"""

import inspect
from collections.abc import Callable, Mapping
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

    arguments: more keywords, passed as they are. Raises TypeError for a column that the row lacks, ValueError for an answer
    that is no list of one; and whatever the function raises.
    """
    parameters = inspect.signature(function).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p.name for p in parameters if p.name in known and p.default is p.empty]

    def ask(sample: Sample) -> Any:
        values = {**_columns(sample), **arguments}
        if missing := [name for name in required if name not in values]:
            raise TypeError(f"it takes {missing}, which the dataset row does not have; its columns are {sorted(values)}")
        result = function(**{name: value for name, value in values.items() if open_ended or name in known})
        try:
            [value] = result
        except (TypeError, ValueError):
            raise ValueError(f"returned {result!r:.100} for one completion; expected a list of one number or None") from None
        return value

    return ask


def _columns(sample: Sample) -> dict[str, Any]:
    """Every keyword that TRL would pass, each a list of one; and verl's three, where no column has their name."""
    record = _json.decode(sample.record)
    prompt = record.pop("prompt", None)
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
