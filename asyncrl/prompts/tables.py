"""Data that a program holds, as a parquet file that every process can read."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from asyncrl.errors import DataError


def write_table(dataset: Any, path: Path, what: str) -> list[str]:
    """Writes a list of dicts, a `datasets.Dataset`, a pandas DataFrame, a pyarrow Table, or whatever else exports Arrow, and
    returns its columns. what: its name in errors. Raises DataError for anything else, for no rows, and for mixed types."""
    try:
        table = _table(dataset)
    except (pa.ArrowException, TypeError) as error:
        raise DataError(
            f"{what} has a column whose values can't stand in one table: {error}; give each column one type"
        ) from error
    if table is None:
        raise DataError(
            f"{what} is a {type(dataset).__name__}; give a list of dicts, a datasets.Dataset (one split of it), a pandas "
            "DataFrame, a pyarrow Table, or the path of a parquet or JSONL file"
        )
    if not table.num_rows:
        raise DataError(f"{what} holds no rows: there is nothing to train on or to evaluate")
    pq.write_table(table, path)
    return list(table.column_names)


def _table(dataset: Any) -> pa.Table | None:
    if isinstance(dataset, list | tuple) and all(isinstance(row, dict) for row in dataset):
        names = dict.fromkeys(name for row in dataset for name in row)  # from_pylist has those of the first row only
        return pa.table({name: [row.get(name) for row in dataset] for name in names})
    if hasattr(dataset, "with_format") and hasattr(dataset, "num_rows") and not isinstance(dataset, dict):
        return pa.table(dataset.with_format("arrow")[:])  # of datasets: its rows as chosen and shuffled
    if hasattr(dataset, "iloc"):
        return pa.Table.from_pandas(dataset, preserve_index=False)
    return pa.table(dataset) if hasattr(dataset, "__arrow_c_stream__") else None
