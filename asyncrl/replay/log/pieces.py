"""Pieces of unfinished rollouts in Arrow: a stream of its own beside the rows, which only a store reads that has a rollout go
on with another generator. What no rollout needs any more is deleted."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pyarrow as pa
from msgspec import Struct

from asyncrl.errors import DataError
from asyncrl.replay.log.rows import from_ipc, to_ipc
from asyncrl.types import RolloutPiece, Span, Tokens, Version

_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())

PIECES = pa.schema(
    [
        ("group", pa.int64()),
        ("rollout", pa.int32()),
        ("attempt", pa.int32()),
        ("start", pa.int32()),  # number of its first token in the response
        ("token_ids", _INTS),
        ("logprobs", _FLOATS),  # as in `Tokens`, and so on
        ("kept_logmass", _FLOATS),
        ("span_incarnations", _INTS),
        ("span_updates", _INTS),
        ("span_lengths", _INTS),
    ],
    metadata={"asyncrl.pieces": "1"},
)
_STRUCT = pa.struct(list(PIECES))


class PieceHead(Struct, frozen=True, gc=False):
    """What the store's core needs of a piece."""

    group: int
    rollout: int
    attempt: int
    start: int
    length: int
    oldest: int  # updates of its tokens
    newest: int


def encode_pieces(pieces: Sequence[RolloutPiece]) -> bytes:
    """Arrow IPC bytes."""
    rows = [
        (
            p.group, p.rollout, p.attempt, p.start, p.token_ids, p.logprobs, p.kept_logmass,
            [s.version.incarnation for s in p.spans], [s.version.update for s in p.spans], [s.length for s in p.spans],
        )
        for p in pieces
    ]  # fmt: skip
    return to_ipc(pa.RecordBatch.from_struct_array(pa.array(rows, _STRUCT)).replace_schema_metadata(PIECES.metadata))


def read_rollout_pieces(data: bytes) -> pa.RecordBatch:
    """Raises `DataError` unless they are of this schema and version, and their lists parallel."""
    try:
        batch = from_ipc(data)
    except pa.ArrowInvalid as error:
        raise DataError(f"pieces of rollouts are not a readable Arrow stream: {error}") from error
    if not batch.schema.equals(PIECES, check_metadata=True):
        raise DataError("pieces of rollouts are of another schema: run one version of asyncrl")
    lengths = _lengths(batch, "token_ids")
    told = [sum(spans) for spans in batch["span_lengths"].to_pylist()]
    if (lengths != _lengths(batch, "logprobs")).any() or lengths.tolist() != told or not all(told):
        raise DataError(f"pieces of {lengths.tolist()} tokens have spans of {told}, or other logprobs: lists must be parallel")
    return batch


def _lengths(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return np.diff(batch[name].offsets.to_numpy())


def piece_heads(batch: pa.RecordBatch) -> list[PieceHead]:
    """Of each of the pieces; reads no token."""
    names = ("group", "rollout", "attempt", "start")
    columns = [*(batch[name].to_pylist() for name in names), _lengths(batch, "token_ids").tolist()]
    return [
        PieceHead(group, rollout, attempt, start, length, min(updates), max(updates))
        for group, rollout, attempt, start, length, updates in zip(*columns, batch["span_updates"].to_pylist(), strict=True)
    ]


def joined(batch: pa.RecordBatch) -> Tokens:
    """All pieces as one."""
    ids, logprobs, kept, incarnations, updates, lengths = (
        batch[name].flatten().to_pylist() for name in PIECES.names if name not in ("group", "rollout", "attempt", "start")
    )
    versions = map(Version, incarnations, updates)
    spans = groupby(zip(versions, lengths, strict=True), key=lambda span: span[0])
    return Tokens(
        token_ids=ids,
        logprobs=logprobs,
        kept_logmass=None if batch["kept_logmass"].null_count else kept,
        spans=tuple(Span(version, sum(length for _, length in of_it)) for version, of_it in spans),
    )
