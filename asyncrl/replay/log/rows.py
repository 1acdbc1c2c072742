"""Rows in Arrow: one per rollout, encoded and decoded in the caller's process; nothing walks over tokens in Python.

Lists of tokens are list columns; versions are spans (three parallel list columns). The schema's version is in its
metadata; a store refuses rows of another one.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Struct

from asyncrl.errors import DataError
from asyncrl.types import Episode, EpisodeSummary, Prompt, Rollout, Status, TrainRollout, Unscored, UnscoredLease, Version

SCHEMA_VERSION = "4"

_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())

ROWS = pa.schema(
    [
        ("run", pa.string()),
        ("group", pa.int64()),
        ("rollout", pa.int32()),
        ("attempt", pa.int32()),
        ("baseline", pa.bool_()),  # greedy, compared with and never trained
        ("purpose", pa.string()),
        ("row", pa.int64()),  # of the dataset
        ("data_source", pa.string()),
        ("ground_truth", pa.string()),  # a text as it is, anything else as JSON
        ("ground_truth_is_json", pa.bool_()),  # which of the two
        ("extra_info", pa.string()),  # JSON
        ("prompt", pa.string()),  # texts without special tokens; the response is what the reward function sees
        ("response", pa.string()),
        ("prompt_ids", _INTS),
        ("response_ids", _INTS),
        ("loss_mask", pa.list_(pa.int8())),  # 1: the policy chose the token
        ("turns", _INTS),
        ("segments", _INTS),  # start offsets in response_ids; null: one, from 0 on
        ("episode", pa.string()),  # types.Episode as JSON; null: a single turn
        ("logprobs", _FLOATS),  # nats, of the sampled distribution
        ("kept_logmass", _FLOATS),  # null where top-p and top-k were off
        ("span_incarnations", _INTS),
        ("span_updates", _INTS),
        ("span_lengths", _INTS),
        ("oldest", pa.int32()),  # update of the oldest and newest token that the policy chose; null: there is none
        ("newest", pa.int32()),
        ("finish_reason", pa.string()),
        ("worker", pa.string()),
        ("times", pa.map_(pa.string(), pa.float64())),  # seconds since the epoch, by hop
        ("token_rewards", pa.list_(pa.float64())),  # null: none, or not scored yet; a rollout's last row says it
    ],
    metadata={"asyncrl.rows": SCHEMA_VERSION},
)

# How version 3 had them, which can be read, not gone on with: what came since is null.
ROWS_3 = pa.schema([f for f in ROWS if f.name not in ("segments", "episode")], metadata={"asyncrl.rows": "3"})

_PROMPT_COLUMNS = ["row", "data_source", "extra_info"]
UNSCORED_COLUMNS = [
    "group", "rollout", "attempt", "purpose", *_PROMPT_COLUMNS, "ground_truth", "ground_truth_is_json", "response",
    "response_ids", "turns", "finish_reason", "episode",
]  # fmt: skip
TEXT_COLUMNS = ["prompt", "response", "ground_truth", "ground_truth_is_json", "finish_reason"]
TRAIN_COLUMNS = [
    "group", "rollout", "attempt", "data_source", "prompt_ids", "response_ids", "loss_mask", "logprobs", "kept_logmass",
    "span_updates", "span_lengths", "finish_reason", "token_rewards", "segments",
]  # fmt: skip


def to_ipc(batch: pa.RecordBatch) -> bytes:
    """A self-contained Arrow IPC stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def from_ipc(data: bytes) -> pa.RecordBatch:
    """Reads it back without copying; the batch keeps `data` alive."""
    return pa.ipc.open_stream(data).read_next_batch()


class Summary(Struct, frozen=True, gc=False):
    """What the store's core needs of a submitted row."""

    group: int
    rollout: int
    attempt: int
    oldest: int  # updates of the oldest and newest token that the policy chose
    newest: int
    length: int
    version: Version | None  # of all its tokens; None if they differ
    problem: str  # why it can't be used, else empty
    status: Status = "invalid"  # what it is then
    figures: dict[str, float] | None = None  # how its episode went; None: a single turn
    incarnation: int = 0  # of the learner that made the newest of its weights


class RowLease(Struct, frozen=True):
    """An `UnscoredLease` as it travels: Arrow rows of UNSCORED_COLUMNS. No bytes: nothing to score before the deadline."""

    lease: int
    lease_s: float
    rows: bytes = b""
    ended: bool = False

    def decode(self) -> UnscoredLease:
        items = decode_unscored(from_ipc(self.rows)) if self.rows else ()
        return UnscoredLease(lease=self.lease, lease_s=self.lease_s, items=items, ended=self.ended)


class TrainScore(Struct, frozen=True):
    """What the learner gets beside a row."""

    reward: float
    parts: dict[str, float]
    baseline: float | None = None  # what its group's greedy rollout earned, if it has one


class TrainRows(Struct, frozen=True):
    """Rollouts to train as they travel: Arrow rows of TRAIN_COLUMNS and, parallel to them, their scores."""

    rows: bytes
    scores: list[TrainScore]

    def decode(self) -> list[TrainRollout]:
        return decode_train(from_ipc(self.rows), self.scores)


def read_submitted(data: bytes) -> pa.RecordBatch:
    """Rows that a generator encoded, which are not copied. Raises `DataError` unless they are of this schema and version."""
    try:
        if data.startswith(_PREFIX):  # so their schema need not be read
            return pa.ipc.read_record_batch(pa.py_buffer(data).slice(len(_PREFIX)), ROWS)
        theirs = (from_ipc(data).schema.metadata or {}).get(b"asyncrl.rows", b"?").decode()
    except pa.ArrowInvalid as error:
        raise DataError(f"submitted rows are not a readable Arrow stream: {error}") from error
    raise DataError(f"rows of schema version {theirs}, this store writes {SCHEMA_VERSION}: run one version of asyncrl")


# ------------------------------------------------------------------------------------------------- encode


_STRUCT = pa.struct(list(ROWS))
_PREFIX = ROWS.serialize().to_pybytes()  # what an IPC stream of these rows begins with


def encode_rollouts(rollouts: Sequence[Rollout], run: str) -> bytes:
    """Arrow IPC bytes of finished rollouts. Raises `DataError` if one's lists are not parallel."""
    for r in rollouts:
        _check_parallel(r)
    rows = pa.array([_row(r, run) for r in rollouts], _STRUCT)  # walked over once, in C++
    return to_ipc(pa.RecordBatch.from_struct_array(rows).replace_schema_metadata(ROWS.metadata))


def _row(r: Rollout, run: str) -> tuple[Any, ...]:
    """A rollout in the order of ROWS."""
    p, spans, chosen = r.prompt, r.spans, _chosen_updates(r)
    oldest, newest = (min(chosen), max(chosen)) if chosen else (None, None)
    return (
        run, r.group, r.rollout, r.attempt, r.baseline, r.purpose,
        p.row, p.data_source, p.readable_truth(), not p.has_text_truth(), p.extra_info,
        r.prompt_text, r.text, p.ids if r.prompt_ids is None else r.prompt_ids, r.response_ids, r.loss_mask, r.turns,
        r.segments if len(r.segments) > 1 else None,
        None if r.episode is None else msgspec.json.encode(r.episode).decode(), r.logprobs, r.kept_logmass,
        [s.version.incarnation for s in spans], [s.version.update for s in spans], [s.length for s in spans],
        oldest, newest, r.finish_reason, r.worker, list(r.times.items()), None,
    )  # fmt: skip


def with_token_rewards(rows: pa.RecordBatch, token_rewards: Sequence[Sequence[float]]) -> pa.RecordBatch:
    """The same rows, with what each of their response tokens earned."""
    earned = pa.array(token_rewards, ROWS.field("token_rewards").type)
    return pa.RecordBatch.from_arrays([earned if f.name == "token_rewards" else rows.column(f.name) for f in ROWS], schema=ROWS)


def _check_parallel(r: Rollout) -> None:
    length = len(r.response_ids)
    lists = {"logprobs": len(r.logprobs), "loss_mask": len(r.loss_mask), "spans": sum(s.length for s in r.spans)}
    if r.kept_logmass is not None:
        lists["kept_logmass"] = len(r.kept_logmass)
    wrong = {name: found for name, found in lists.items() if found != length}
    if wrong:
        raise DataError(
            f"rollout {r.rollout} of group {r.group} has {length} response tokens, but {wrong}: lists must be parallel"
        )
    if r.segments != (0,):
        _check_segments(r)


def _check_segments(r: Rollout) -> None:
    """Every segment but the first starts with a prompt of its own."""
    rising = r.segments[:1] == (0,) and all(a < b for a, b in pairwise((*r.segments, len(r.response_ids))))
    if not rising or any(r.loss_mask[start] for start in r.segments[1:]):
        raise DataError(
            f"rollout {r.rollout} of group {r.group} of {len(r.response_ids)} response tokens has segments {r.segments}: they "
            "must rise from 0, and each but the first begin with a token that the policy did not choose"
        )


def _chosen_updates(r: Rollout) -> set[int]:
    """Updates of the tokens that the policy chose."""
    if len(r.spans) == 1:
        return {r.spans[0].version.update} if any(r.loss_mask) else set()
    ends = accumulate(s.length for s in r.spans)
    return {s.version.update for s, end in zip(r.spans, ends, strict=True) if any(r.loss_mask[end - s.length : end])}


_summary = msgspec.json.Decoder(EpisodeSummary).decode  # skips what was said


def summaries(batch: pa.RecordBatch) -> list[Summary]:
    """What the core needs of submitted rows; reads no token."""
    names = ("group", "rollout", "attempt", "oldest", "newest", "finish_reason", "episode", "span_incarnations", "span_updates")
    lengths = np.diff(batch.column("response_ids").offsets.to_numpy()).tolist()
    columns = [batch.column(name).to_pylist() for name in names]
    found = []
    for group, rollout, attempt, oldest, newest, reason, told, incarnations, updates, length in zip(
        *columns, lengths, strict=True
    ):
        versions = set(zip(incarnations, updates, strict=True))
        version = Version(*versions.pop()) if len(versions) == 1 else None
        problem = "finish_reason=abort" if reason == "abort" else "" if oldest is not None else "no token chosen by the policy"
        status: Status = "invalid"
        figures = None
        if told is not None:
            episode = _summary(told)
            figures = episode.measures()
            if problem and episode.status != "ok":
                status, problem = episode.status, episode.error
            elif problem:
                problem = "the episode ended before the policy had answered anything"
        of, made = (group, rollout, attempt), max(incarnations, default=0)
        found.append(Summary(*of, oldest or 0, newest or 0, length, version, problem, status, figures, made))
    return found


# ------------------------------------------------------------------------------------------------- decode


def _slices(column: pa.Array, dtype: type) -> Callable[[int], np.ndarray]:
    """row -> its list as an array; converted once for the whole column, sliced without copying."""
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False).astype(dtype)
    return lambda i: values[offsets[i] : offsets[i + 1]]


def decode_train(batch: pa.RecordBatch, scores: Iterable[TrainScore]) -> list[TrainRollout]:
    """Rows of TRAIN_COLUMNS with their scores, in order."""
    ints = {n: _slices(batch.column(n), np.int64) for n in ("prompt_ids", "response_ids", "span_updates", "span_lengths")}
    mask = _slices(batch.column("loss_mask"), np.bool_)
    logprobs, logmass = (_slices(batch.column(n), np.float32) for n in ("logprobs", "kept_logmass"))
    earned = _slices(batch.column("token_rewards"), np.float64)
    cut, earns = (batch.column(n).is_valid().to_pylist() for n in ("kept_logmass", "token_rewards"))
    names = ("group", "rollout", "attempt", "data_source", "finish_reason", "segments")
    scalars = zip(*(batch.column(n).to_pylist() for n in names), strict=True)
    return [
        TrainRollout(
            group=group,
            rollout=rollout,
            attempt=attempt,
            data_source=data_source,
            finish_reason=finish_reason,
            prompt_ids=ints["prompt_ids"](i),
            response_ids=ints["response_ids"](i),
            loss_mask=mask(i),
            logprobs=logprobs(i),
            kept_logmass=logmass(i) if cut[i] else None,
            updates=np.repeat(ints["span_updates"](i), ints["span_lengths"](i)),
            reward=score.reward,
            parts=score.parts,
            token_rewards=earned(i) if earns[i] else None,
            baseline=score.baseline,
            segments=tuple(segments or (0,)),
        )
        for i, ((group, rollout, attempt, data_source, finish_reason, segments), score) in enumerate(
            zip(scalars, scores, strict=True)
        )
    ]


def decode_unscored(batch: pa.RecordBatch) -> tuple[Unscored, ...]:
    """Rows of UNSCORED_COLUMNS. Their prompts have no ids: rewards work on text and on the row of the dataset."""
    found = []
    for named in batch.to_pylist():
        truth = named.pop("ground_truth")
        if not named.pop("ground_truth_is_json"):
            truth = msgspec.json.encode(truth).decode()
        prompt = Prompt(ids=(), ground_truth=truth, **{name: named.pop(name) for name in _PROMPT_COLUMNS})
        told = named.pop("episode")
        episode = msgspec.json.decode(told, type=Episode) if told else None
        found.append(
            Unscored(prompt=prompt, text=named.pop("response"), turns=tuple(named.pop("turns")), episode=episode, **named)
        )
    return tuple(found)


def decode_texts(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """TEXT_COLUMNS of each row, the ground truth as it was in the data."""
    rows = batch.to_pylist()
    for row in rows:
        if row.pop("ground_truth_is_json"):
            row["ground_truth"] = msgspec.json.decode(row["ground_truth"])
    return rows
