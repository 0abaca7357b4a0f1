"""Reads the wanted columns of Parquet files, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from arc_ds.errors import DataError
from arc_ds.shards.building.batches import BATCH_BYTES, Batch, Cursor, InputFile, import_library

if TYPE_CHECKING:
    import pyarrow

_MAX_ROWS = 4096
_READ_AHEAD = 1 << 20  # bytes of a column chunk that are buffered at once


def read_row_batches(file: InputFile, columns: Sequence[str], start: Cursor) -> Iterator[Batch]:
    """Read the rows of a Parquet file. A batch does not cross row groups.

    columns: the columns to read. Columns that the file lacks are ignored.
    start: the first batch to read.

    Raises DataError if the file has none of the columns or is damaged, or if pyarrow is not installed.
    """
    pyarrow = import_library(file, "pyarrow")
    pyarrow_parquet = import_library(file, "pyarrow.parquet")
    try:
        with pyarrow_parquet.ParquetFile(file.path, buffer_size=_READ_AHEAD, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            wanted = [name for name in columns if name in names]
            if not wanted:
                raise DataError(f"{file.path}: expected the columns {', '.join(columns)}; it has {', '.join(names)}.")
            first_row = 1 + sum(parquet.metadata.row_group(idx).num_rows for idx in range(start.place))
            bytes_per_row = file.num_bytes / max(parquet.metadata.num_rows, 1)
            for idx in range(start.place, parquet.num_row_groups):
                group = parquet.metadata.row_group(idx)
                size, row = _rows_at_once(group, wanted), 0
                for rows in parquet.iter_batches(size, row_groups=[idx], columns=wanted, use_threads=False):
                    if idx > start.place or row >= start.number:  # `start` is at a batch boundary
                        position = int(bytes_per_row * (first_row - 1 + row + len(rows)))
                        yield Batch(
                            cursor=Cursor(idx, row), content=_plain(rows), position=position, first_row=first_row + row
                        )
                    row += len(rows)
                first_row += group.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file.path}: cannot be read as Parquet ({error}). Repair or leave out the file.") from error


def _rows_at_once(group: Any, columns: list[str]) -> int:
    """The number of rows that take about `BATCH_BYTES`, given the average row size in the wanted columns."""
    chunks = [group.column(idx) for idx in range(group.num_columns)]
    num_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
    return max(1, min(_MAX_ROWS, BATCH_BYTES * group.num_rows // max(num_bytes, 1)))


def _plain(rows: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Convert dictionary and string-view columns to plain strings.

    The rows of such a column share one dictionary or buffer. Without the conversion, the measured size of each row and
    the serialised batch would include the texts of all rows.
    """
    schema = rows.schema
    for idx, column in enumerate(schema):
        schema = schema.set(idx, column.with_type(_plain_type(column.type)))
    return rows if schema == rows.schema else rows.cast(schema)


def _plain_type(stored: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow

    if pyarrow.types.is_dictionary(stored):
        return _plain_type(stored.value_type)
    if pyarrow.types.is_list(stored) or pyarrow.types.is_large_list(stored):
        inner = _plain_type(stored.value_type)
        return stored if inner == stored.value_type else pyarrow.large_list(inner)
    return pyarrow.large_string() if pyarrow.types.is_string_view(stored) else stored
