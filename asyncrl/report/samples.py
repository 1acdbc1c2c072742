"""What is known of each rollout of a run, for people: picked from the columns of its log, then described whole.

    log = asyncrl.replay.open("runs/arithmetic")
    lines = compared(log.rollouts(SCALARS, each=summed))              # a line per rollout, of millions too: no texts, no tokens
    picked = ranked(chosen(lines, update=100, status="ok"), by="gain", worst=3, best=3)
    samples = samples_of(log.rollouts(DETAILS, groups=groups_of(picked)), picked)             # a list of RolloutSample
    for together in by_group(samples): …                                                   # the responses to one prompt

Nothing here reads a log. Lines of `surprise` need the tokens: they are read with SCALARS_AND_TOKENS instead of SCALARS.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from asyncrl.types import Purpose, Status

Order = Literal["reward", "gain", "length", "surprise", "lag"]

_KEYS = ["group", "rollout", "attempt"]
SCALARS = [
    *_KEYS, "baseline", "purpose", "data_source", "oldest", "span_lengths", "token_rewards", "status", "reward", "outcome",
    "trained_update",
]  # fmt: skip
SCALARS_AND_TOKENS = [*SCALARS, "loss_mask", "logprobs"]
DETAILS = [
    *SCALARS_AND_TOKENS, "row", "ground_truth", "prompt", "response", "response_ids", "turns", "segments", "episode",
    "span_updates", "finish_reason", "worker", "times", "parts", "error", "said",
]  # fmt: skip
_LISTS = ("span_lengths", "token_rewards", "loss_mask", "logprobs")  # what `summed` makes numbers of

# Control characters, marks of writing direction, separators, and halves of surrogate pairs.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Message(Struct, frozen=True):
    """What was said in one turn of an episode."""

    role: str
    content: str  # JSON, where it is no plain text


class TokenSpan(Struct, frozen=True):
    """Response tokens [start, end) that the weights of one update produced."""

    start: int
    end: int
    update: int


class RolloutSample(Struct, frozen=True, kw_only=True):
    """One rollout. What is None is not known: not scored yet, not trained, or of a group in which nothing can be compared."""

    group: int
    rollout: int
    attempt: int
    purpose: Purpose
    baseline: bool  # greedy, compared with and never trained
    row: int  # of the dataset
    data_source: str
    prompt: str
    response: str
    ground_truth: str
    status: Status | None
    reward: float | None
    parts: dict[str, float]
    gain: float | None  # its reward, tokens' included, less the mean of its group's: the group-relative advantage
    error: str
    said: dict[str, str]  # by judges, by the name of their term
    outcome: str | None  # of the group; None: pending
    trained_update: int | None
    lag: int | None  # of its oldest token, when it was trained: updates made since that token's weights
    length: int  # response tokens, those of tools included
    finish_reason: str
    surprise: float | None  # mean −logprob of the tokens that the policy chose, nats
    worker: str
    times: dict[str, float]  # seconds since the epoch, by hop
    turns: tuple[int, ...]  # start offsets of the turns in the response's tokens
    messages: tuple[Message, ...]  # of an episode; of a single answer none
    token_ids: tuple[int, ...]  # of the response, and parallel to them:
    chosen: tuple[bool, ...]  # whether the policy chose the token
    logprobs: tuple[float, ...]  # nats, of the distribution that was sampled
    spans: tuple[TokenSpan, ...]  # one after the other, over all of them

    @property
    def name(self) -> str:
        """group/rollout/attempt, as actors' logs have it."""
        return f"{self.group}/{self.rollout}/{self.attempt}"


# ------------------------------------------------------------------------------------------------- lines


def summed(rows: pa.Table) -> pa.Table:
    """Rows, with numbers in place of lists of tokens: `length`, `token_sum` (what they earned beside the reward) and, if the
    tokens' columns are there, `surprise`. For pieces of a log while it is read."""
    lists = {name: _Lists(rows.column(name)) for name in _LISTS if name in rows.column_names}
    found = rows.drop_columns(list(lists))
    found = found.append_column("length", pa.array(lists["span_lengths"].sums().astype(np.int32)))
    found = found.append_column("token_sum", pa.array(lists["token_rewards"].sums()))
    if "logprobs" not in lists:
        return found
    chosen = lists["loss_mask"]
    counts = chosen.sums()
    with np.errstate(invalid="ignore"):
        surprise = -lists["logprobs"].sums(chosen.values) / counts
    return found.append_column("surprise", pa.array(surprise, mask=counts == 0))


def compared(lines: pa.Table) -> pa.Table:
    """Lines with `gain` and `lag`: what they are beside the rest of their group, and beside the update that trained them.

    lines: of whole groups, with the columns of SCALARS after `summed`.
    """
    reward = lines.column("reward").to_numpy() + lines.column("token_sum").to_numpy()  # NaN where there is none
    counts = np.isfinite(reward) & ~lines.column("baseline").to_numpy()
    _, place = np.unique(lines.column("group").to_numpy(), return_inverse=True)
    n = np.bincount(place, weights=counts)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=np.where(counts, reward, 0.0)) / n
    alone = ~counts | (n[place] < 2)
    lines = lines.append_column("gain", pa.array(np.where(alone, 0.0, reward - mean[place]), mask=alone))
    return lines.append_column("lag", pc.subtract(pc.subtract(lines.column("trained_update"), 1), lines.column("oldest")))


def chosen(
    lines: pa.Table,
    *,
    update: int | None = None,
    group: int | None = None,
    status: str = "",
    source: str = "",
    purpose: Purpose | None = "train",
) -> pa.Table:
    """The lines for which all of this holds. update: that trained them."""
    wanted = {"trained_update": update, "group": group, "status": status, "data_source": source, "purpose": purpose}
    for name, value in wanted.items():
        if value not in (None, ""):
            lines = lines.filter(pc.equal(lines.column(name), pa.scalar(value, lines.schema.field(name).type)))
    return lines


def ranked(lines: pa.Table, *, by: Order | None = None, worst: int = 0, best: int = 0) -> pa.Table:
    """The lines with the `worst` smallest of `by` (None: reward), smallest first, then the `best` largest, largest first; none
    twice. Neither: all lines, largest first, or without `by` as they are. Lines that have no such number are only among all."""
    if not (worst or best):
        return lines if by is None else lines.take(_places_by(lines, by, "descending"))
    by = by or "reward"
    lines = lines.filter(pc.is_valid(lines.column(by)))
    worst, rest = min(worst, len(lines)), len(lines)
    found = [_places_by(lines, by, "ascending")[:worst], _places_by(lines, by, "descending")[: min(best, rest - worst)]]
    return lines.take(pa.chunked_array(found, pa.uint64()))


def _places_by(lines: pa.Table, by: str, order: str) -> pa.Array:
    """Places in order; equal ones as they stand in the log, or from its end."""
    at = pa.table({"by": lines.column(by), "at": np.arange(len(lines))})
    return pc.sort_indices(at, sort_keys=[("by", order), ("at", order)])  # nulls at the end


def groups_of(lines: pa.Table) -> list[int]:
    """Their groups, each once, in the order of the lines."""
    return pc.unique(lines.column("group")).to_pylist()


# ------------------------------------------------------------------------------------------------- samples


def samples_of(rows: pa.Table, lines: pa.Table | None = None) -> list[RolloutSample]:
    """All that is known of the lines' rollouts, in the order of the lines. None: of all rows.

    rows: of all rollouts of these groups, with the columns of DETAILS.
    """
    figures = compared(summed(rows)).select(["length", "gain", "lag", "surprise"]).to_pylist()
    found = {tuple(row[key] for key in _KEYS): (row, more) for row, more in zip(_rows(rows), figures, strict=True)}
    if lines is None:
        return [_sample(row, more) for row, more in found.values()]
    keys = zip(*(lines.column(key).to_pylist() for key in _KEYS), strict=True)
    return [_sample(*found[key]) for key in keys]


def visible(text: str) -> str:
    """The text with whatever would move a terminal's cursor or change its state, or the order of letters, written as escapes;
    line feeds and tabs as they are."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def by_group(samples: Sequence[RolloutSample]) -> list[list[RolloutSample]]:
    """The samples of each group together; groups in the order of their first."""
    found: dict[int, list[RolloutSample]] = {}
    for sample in samples:
        found.setdefault(sample.group, []).append(sample)
    return list(found.values())


def _rows(rows: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rows.select(DETAILS).to_pylist()
    return found


def _sample(row: dict[str, Any], figures: dict[str, Any]) -> RolloutSample:
    ends = list(accumulate(row["span_lengths"]))
    spans = zip([0, *ends[:-1]], ends, row["span_updates"], strict=True)
    same = {name: row[name] for name in RolloutSample.__struct_fields__ if name in row}
    return RolloutSample(
        **(same | figures)
        | {
            "parts": dict(row["parts"] or ()),
            "said": dict(row["said"] or ()),
            "error": row["error"] or "",
            "times": dict(row["times"]),
            "turns": tuple(row["turns"]),
            "messages": _messages(row["episode"]),
            "token_ids": tuple(row["response_ids"]),
            "chosen": tuple(map(bool, row["loss_mask"])),
            "logprobs": tuple(row["logprobs"]),
            "spans": tuple(TokenSpan(*span) for span in spans),
        }
    )


class _Episode(Struct, frozen=True):
    messages: str = "[]"


def _messages(episode: str | None) -> tuple[Message, ...]:
    """What was said in an episode, given as JSON (types.Episode)."""
    if episode is None:
        return ()
    said: list[dict[str, Any]] = msgspec.json.decode(msgspec.json.decode(episode, type=_Episode).messages)
    return tuple(Message(str(message.get("role", "")), _text(message)) for message in said)


def _text(message: dict[str, Any]) -> str:
    """Its text, then all else that it holds (calls of tools) as JSON."""
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    told = content if isinstance(content, str) else msgspec.json.encode(content).decode() if content else ""
    return "\n".join(part for part in (told, msgspec.json.encode(rest).decode() if rest else "") if part)


class _Lists:
    """A column of lists of numbers: all values, and which line each is of. A null counts as an empty list."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        self.values = lists.flatten().to_numpy(zero_copy_only=False)
        self._lines, self._of = len(lists), np.repeat(np.arange(len(lists)), lengths)

    def sums(self, weights: np.ndarray | float = 1) -> np.ndarray:
        """Of each line."""
        return np.bincount(self._of, weights=self.values * weights, minlength=self._lines).astype(np.float64)
