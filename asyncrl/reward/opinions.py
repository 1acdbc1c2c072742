"""What judges are asked, and what their texts are worth. Pure; texts are read where reward functions run.

A judge reads what the policy wrote, and may quote it: `score: 10` of a candidate's own. So the last match in its text counts,
and nothing that a response says about braces or placeholders is filled in again.
"""

import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.config import JudgeSpec, RewardTerm
from asyncrl.config.callables import describe, load_callable
from asyncrl.errors import ConfigError
from asyncrl.reward.results import Opinion, Sample, Verdict

Chat = str | list[dict[str, Any]]  # what a model reads: a text, or messages

_SCORE = r"(?i)\bscore\W{0,5}?(-?\d+(?:\.\d+)?)"
_BETTER = r"\[\[([ABC])\]\]"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_RECORDED = 10_000  # characters of a text that the log keeps


# ---------------------------------------------------------------------------------------------- questions


def api_key(judge: JudgeSpec) -> str:
    """Of a judge's API; empty if it needs none. Raises ConfigError if it is not in the environment."""
    key = os.environ.get(judge.key_env, "").strip() if judge.key_env else ""
    if judge.key_env and not key:
        raise ConfigError(f"reward.judge.key_env={judge.key_env!r} is not set here, so nobody could be asked; export it")
    return key


def conversation(sample: Sample) -> Chat:
    """Prompt and response as messages; one text where the prompt is one. Of an episode its messages."""
    if told := msgspec.json.decode(sample.episode):
        messages: list[dict[str, Any]] = told["messages"]
        return messages
    prompt = msgspec.json.decode(sample.record).get("prompt", "")
    if isinstance(prompt, str):
        return prompt + sample.solution_str
    return [*prompt, {"role": "assistant", "content": sample.solution_str}]


def question(template: str, sample: Sample, other: Sample | None = None) -> str:
    """The template, filled in. other: the second response of a pair. Braces around what is no word stay as they are.

    Raises ValueError for a placeholder that is no column of the row.
    """
    record = msgspec.json.decode(sample.record)
    values = {**record, "ground_truth": msgspec.json.decode(sample.ground_truth), "data_source": sample.data_source}
    values |= {"prompt": _readable(record.get("prompt", "")), "response": _response(sample)}
    if other is not None:
        values |= {"response_a": values.pop("response"), "response_b": _response(other)}

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"the judge's prompt has {match[0]}, but there are only {', '.join(sorted(values))}")
        value = values[match[1]]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return _PLACEHOLDER.sub(fill, template)


def read_prompt(judge: JudgeSpec) -> str:
    """What a judge is asked. Raises ConfigError if there is no such file, or the response is not in it."""
    try:
        template = Path(judge.prompt).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reward.judge.prompt={judge.prompt!r} can't be read: {error}; name a text file") from error
    wanted = {"response_a", "response_b"} if judge.pairwise else {"response"}
    if missing := wanted - set(_PLACEHOLDER.findall(template)):
        raise ConfigError(
            f"reward.judge.prompt={judge.prompt!r} has no {{{min(missing)}}}: the judge would not see what it judges; put it in"
        )
    return template


def _response(sample: Sample) -> str:
    """What a judge reads of it: the text; of an episode all that followed the first question."""
    if not (told := msgspec.json.decode(sample.episode)):
        return sample.solution_str
    roles = [message.get("role") for message in told["messages"]]
    return _readable(told["messages"][roles.index("assistant") if "assistant" in roles else 0 :])


def _readable(chat: Chat) -> str:
    """Messages as text, a single one without its role."""
    if isinstance(chat, str):
        return chat
    texts = [(message.get("role", ""), message.get("content") or "", message.get("tool_calls")) for message in chat]
    told = [(role, content if isinstance(content, str) else json.dumps(content), calls) for role, content, calls in texts]
    if len(told) == 1:
        return told[0][1]
    return "\n\n".join(
        f"{role}: {text}" + (f"\n{json.dumps(calls, ensure_ascii=False)}" if calls else "") for role, text, calls in told
    )


# ------------------------------------------------------------------------------------------------ answers


def reader(term: RewardTerm) -> Callable[[Opinion], Verdict]:
    """What turns answers of a term's model or judge into verdicts. Raises ConfigError for a `parse` that can't be loaded."""
    judge = term.judge
    if judge is None:
        return lambda answer: Verdict(answer.status, answer.score, error=answer.error)
    read = load_callable(judge.parse, "reward.judge.parse") if judge.parse else _last(judge)
    worth = _share_of_wins if judge.pairwise else _AGGREGATES[judge.aggregate]

    def verdict(answer: Opinion) -> Verdict:
        said = {term.name: "\n\n---\n\n".join(answer.texts)[:_RECORDED]} if answer.texts else {}
        if answer.status != "ok" or not answer.texts:  # there may be no other response to compare with: it does not apply
            return Verdict(answer.status, error=answer.error, said=said)
        try:
            return Verdict("ok", float(worth([read(text) for text in answer.texts])), said=said)
        except BaseException as error:  # as of a reward function
            return Verdict("invalid", error=f"the judge's text can't be read: {describe(error)}", said=said)

    return verdict


def _last(judge: JudgeSpec) -> Callable[[str], Any]:
    """What finds the pattern's last match in a text. Raises ValueError where there is none."""
    pattern = re.compile(judge.pattern or (_BETTER if judge.pairwise else _SCORE))

    def read(text: str) -> str | float:
        matches = list(pattern.finditer(text))
        if not matches:
            raise ValueError(f"no {pattern.pattern!r} in {text[-200:]!r}")
        return matches[-1][1] if judge.pairwise else float(matches[-1][1])

    return read


def _share_of_wins(better: Sequence[Any]) -> float:
    """Of responses said to be better in pairs, in which this one stood first and second in turn."""
    wins = [{"A": 1.0, "B": 0.0}.get(str(which).upper(), 0.5) for which in better]
    return statistics.fmean(win if place % 2 == 0 else 1.0 - win for place, win in enumerate(wins))


_AGGREGATES: dict[str, Callable[[Sequence[Any]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "majority": statistics.mode,
}
