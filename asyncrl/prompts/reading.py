"""Dataset rows from verl's parquet schema and from JSONL, checked as they stream."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from asyncrl.config import DataSpec
from asyncrl.errors import DataError

Messages = list[dict[str, Any]]
Text = str | Messages  # a plain prompt, or chat messages {role, content}

_BATCH_ROWS = 1024


class DatasetRow(Struct, frozen=True, kw_only=True):
    """One row of a dataset."""

    row: int  # counts from 0 over all files, in order
    where: str  # file and place, for errors
    prompt: Text
    data_source: str
    ground_truth: Any
    extra_info: Any
    columns: Mapping[str, Any] = {}  # all that the row holds, by name


def read_rows(spec: DataSpec) -> Iterator[DatasetRow]:
    """Every row of `spec.files`, in order. Raises DataError naming file, row or line, and the columns found."""
    found = ((Path(file), where, record) for file in spec.files for where, record in records(Path(file)))
    for number, (file, where, record) in enumerate(found):
        yield _row(number, where, record, spec, file)


def check_columns(files: Sequence[str], spec: DataSpec) -> None:
    """Proves that each file exists and its first row is well-formed, without reading more. Raises DataError."""
    for file in files:
        where, record = first_record(file, "to train on or to evaluate")
        _row(0, where, record, spec, Path(file))


def first_record(file: str, purpose: str) -> tuple[str, Mapping[str, Any]]:
    """A file's first row and where it stands. Raises DataError for a file without rows; purpose: what there is nothing for."""
    first = next(records(Path(file)), None)
    if first is None:
        raise DataError(f"{file} holds no rows: there is nothing {purpose}")
    return first


def records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every row of a parquet or JSONL file, and where it stands. Raises DataError for what is no such file."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.*")], n=1, cutoff=0.5)
        raise DataError(f"no data file {path.absolute()}" + (f"; did you mean {path.with_name(near[0])}?" if near else ""))
    if path.suffix == ".parquet":
        return _parquet_records(path)
    if path.suffix in {".jsonl", ".json", ".ndjson"}:
        return _json_records(path)
    raise DataError(f"{path}: the format {path.suffix or 'without a suffix'!r} is not known; use .parquet or .jsonl")


def _parquet_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            rows = (row for batch in file.iter_batches(_BATCH_ROWS) for row in batch.to_pylist())
            for number, record in enumerate(rows):
                yield f"{path}, row {number}", record
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as parquet: {error}") from error


def _json_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = msgspec.json.decode(line.decode().removeprefix("\ufeff"))  # a byte order mark
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}, byte {error.start + 1} is 0x{line[error.start]:02x}, which is not UTF-8, and JSON is; convert "
                    "the file, for example by `iconv -f latin1 -t utf-8 OLD > NEW` (utf-16 or windows-1252 where Windows "
                    "wrote it)"
                ) from error
            except msgspec.DecodeError as error:
                raise DataError(f"{where} is not JSON: {error}; write one object per line") from error
            if not isinstance(record, dict):
                raise DataError(f"{where} holds a {type(record).__name__}; write one object per line")
            yield where, record


def _row(number: int, where: str, record: Mapping[str, Any], spec: DataSpec, path: Path) -> DatasetRow:
    """An empty answer_key means no ground truth, an empty source_key the file's name."""
    prompt = as_text(value_at(record, spec.prompt_key, "data.prompt_key", where), spec.prompt_key, where)
    source = value_at(record, spec.source_key, "data.source_key", where) if spec.source_key else path.stem
    if not isinstance(source, str):
        raise DataError(f"{where}: {spec.source_key!r} (data.source_key) is {shown(source)}; expected a string")
    return DatasetRow(
        row=number,
        where=where,
        prompt=prompt,
        data_source=source,
        ground_truth=value_at(record, spec.answer_key, "data.answer_key", where) if spec.answer_key else None,
        extra_info=record.get("extra_info"),
        columns=record,
    )


def value_at(record: Mapping[str, Any], key: str, field: str, where: str) -> Any:
    """The value at a column's name or, failing that, at a dotted path."""
    if key in record:
        return record[key]
    value: Any = record
    inside = ""
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            found = sorted(map(str, value)) if isinstance(value, Mapping) else []
            what = f"{inside!r} has no field {part!r}" if inside else f"no column {part!r}"
            if inside and not found:
                what = f"{inside!r} is {shown(value)}, which has no field {part!r}"
            near = difflib.get_close_matches(part, found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{where}: {what} ({field}={key!r}); {'fields' if inside else 'columns'} found: {', '.join(found)}{hint}"
            )
        value = value[part]
        inside = f"{inside}.{part}" if inside else part
    return value


def as_text(value: Any, key: str, where: str, field: str = "data.prompt_key") -> Text:
    """A plain prompt or well-formed chat messages; raises DataError for anything else. field: the setting that holds `key`."""
    expected = "expected a non-empty string or a list of chat messages {role, content}"
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key!r} ({field}) is {shown(value)}; {expected}")
    for place, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{where}: {key!r} message {place} is {shown(message)}; {expected}")
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise DataError(
                    f"{where}: {key!r} message {place} has {part}={shown(message.get(part))}, "
                    f"fields found: {', '.join(map(str, message))}; {expected}"
                )
    return value


def shown(value: Any) -> str:
    """A value for an error message: its type, and how it begins."""
    if value is None:
        return "null"
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {type(value).__name__}"
    return f"{type(value).__name__} {str(value)[:60]!r}"
