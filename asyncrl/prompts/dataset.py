"""Prompts tokenized once into an Arrow IPC file, then read by memory map."""

import hashlib
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Struct

from asyncrl.config import DataSpec
from asyncrl.errors import DataError
from asyncrl.prompts.encoding import Encode
from asyncrl.prompts.reading import DatasetRow, read_rows
from asyncrl.rundir import atomic_file
from asyncrl.types import Prompt

_FORMAT = 2
_BATCH_ROWS = 1024
_FINGERPRINT = b"asyncrl.fingerprint"
_ROWS_READ = b"asyncrl.rows_read"
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("ids", pa.list_(pa.int32())),
        ("data_source", pa.string()),
        ("ground_truth", pa.string()),
        ("extra_info", pa.string()),
        ("record", pa.string()),
    ]
)
_PROMPT_COLUMNS = _SCHEMA.names[:-1]


class PromptSummary(Struct, frozen=True, kw_only=True):
    """What a prepared file holds."""

    path: Path
    rows: int  # read
    prompts: int  # kept

    @property
    def too_long(self) -> int:
        """Rows whose prompts were left out."""
        return self.rows - self.prompts


def prepare(spec: DataSpec, encode: Encode, out: Path, tokenizer_id: str, must_reuse: bool = False) -> PromptSummary:
    """Tokenizes every row of `spec.files` into `out`, leaving out prompts longer than `max_prompt_length` tokens.

    Skipped if `out` was made from the same file contents, keys, bound and tokenizer (`tokenizer_id` stands for it, see
    `encoding.identity`). Written beside and renamed. Raises DataError: a malformed row, no prompt left, or, with
    `must_reuse`, data or a tokenizer that are not those of `out`.
    """
    fingerprint = _fingerprint(spec, tokenizer_id)
    if (known := _existing(out, fingerprint)) is not None:
        return known
    if must_reuse:
        raise DataError(
            f"{', '.join(map(str, spec.files))} or the tokenizer changed since {out} was made: groups in the run's log would "
            "be finished with other prompts; put the old files back, or start a new run under another --name"
        )
    with atomic_file(out) as beside:
        lengths = _write(spec, encode, beside, fingerprint)
        kept = sum(length <= spec.max_prompt_length for length in lengths)
        if not kept:
            raise DataError(_nothing_left(spec, lengths))
    return PromptSummary(path=out, rows=len(lengths), prompts=kept)


class PromptFile(Sequence[Prompt]):
    """The prompts of a prepared file, by position. Memory-mapped: opening costs nothing, and processes share the pages."""

    def __init__(self, path: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a prepared prompt file: {error}; delete it, and it will be made again") from error
        self._columns = {name: table.column(name) for name in table.column_names}

    def __len__(self) -> int:
        return len(self._columns["row"])

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[i] for i in place]
        row, ids, source, truth, extra = (self._columns[name][place] for name in _PROMPT_COLUMNS)
        return Prompt(
            row=row.as_py(),
            ids=tuple(ids.values.to_numpy().tolist()),
            data_source=source.as_py(),
            ground_truth=truth.as_py(),
            extra_info=extra.as_py(),
        )

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._columns["row"].to_numpy()

    def record(self, row: int) -> str:
        """JSON of the whole dataset row that `Prompt.row` names, its prompt under "prompt".

        An empty object if the row is not here: held-out files may change between a run and its resumption, and a rollout that
        still waits for its score from before must cost at most itself.
        """
        place = int(np.searchsorted(self._rows, row))  # they stand in rising order
        if place == len(self) or self._rows[place] != row:
            return "{}"
        return str(self._columns["record"][place].as_py())


def to_json(value: Any) -> str:
    """JSON text of what Arrow or numpy yields: nested values, None, dates, decimals, arrays. NaN becomes null."""
    return msgspec.json.encode(value, enc_hook=_plain).decode()


def as_prompt(row: DatasetRow, encode: Encode) -> Prompt:
    """One row, tokenized. Raises DataError for an empty result, or a value that JSON can't hold."""
    ids = encode(row.prompt)
    if not ids:
        raise DataError(f"{row.where}: the prompt has no tokens; generation needs at least one")
    try:
        truth, extra = to_json(row.ground_truth), to_json(row.extra_info)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{row.where}: ground truth or extra_info can't be written as JSON: {error}") from error
    return Prompt(row=row.row, ids=tuple(ids), data_source=row.data_source, ground_truth=truth, extra_info=extra)


def as_record(row: DatasetRow) -> str:
    """The row's columns as one JSON object, its prompt under "prompt". What JSON can't hold is left out: a reward function
    that asks for such a column is told which ones there are."""
    fields = []
    for name, value in {**row.columns, "prompt": row.prompt}.items():
        try:
            fields.append(f"{to_json(name)}:{to_json(value)}")
        except (TypeError, ValueError, OverflowError):
            continue
    return "{" + ",".join(fields) + "}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r:.60}")


def _write(spec: DataSpec, encode: Encode, path: Path, fingerprint: str) -> list[int]:
    """Returns the length in tokens of every row's prompt."""
    lengths: list[int] = []
    found = read_rows(spec)
    schema = _SCHEMA.with_metadata({_FINGERPRINT: fingerprint})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while rows := list(itertools.islice(found, _BATCH_ROWS)):
            prompts = [as_prompt(row, encode) for row in rows]
            lengths += [len(prompt.ids) for prompt in prompts]
            kept = [
                {**msgspec.structs.asdict(prompt), "record": as_record(row)}
                for prompt, row in zip(prompts, rows, strict=True)
                if len(prompt.ids) <= spec.max_prompt_length
            ]
            writer.write_batch(pa.RecordBatch.from_pylist(kept, _SCHEMA))
        # How many rows were read is known only now, and a file's schema is written first: an empty batch carries it.
        writer.write_batch(pa.RecordBatch.from_pylist([], _SCHEMA), custom_metadata={_ROWS_READ: str(len(lengths))})
    return lengths


def _existing(path: Path, fingerprint: str) -> PromptSummary | None:
    """The summary of a prepared file, if it is whole and made from the same inputs."""
    if not path.is_file():
        return None
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if (reader.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
            return None
        _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    except (OSError, pa.ArrowException):  # torn by a crash of the machine: made again
        return None
    return PromptSummary(path=path, rows=int(metadata[_ROWS_READ]), prompts=len(PromptFile(path)))


def _fingerprint(spec: DataSpec, tokenizer_id: str) -> str:
    """Of everything that `out` depends on; not of shuffle and epochs, which choose among its prompts later."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (_FORMAT, spec.prompt_key, spec.answer_key, spec.source_key, spec.max_prompt_length, tokenizer_id):
        digest.update(f"{part}\0".encode())
    for name in spec.files:
        digest.update(f"{Path(name).name}\0".encode())
        try:
            with open(name, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise DataError(f"data file {Path(name).absolute()} can't be read: {error.strerror}") from error
    return digest.hexdigest()


def _nothing_left(spec: DataSpec, lengths: Sequence[int]) -> str:
    files = ", ".join(spec.files)
    if not lengths:
        return f"{files}: no rows, so there is nothing to train on"
    return (
        f"{files}: all {len(lengths)} prompts are longer than data.max_prompt_length={spec.max_prompt_length} tokens (the "
        f"shortest has {min(lengths)}): nothing is left to train on; raise data.max_prompt_length"
    )
