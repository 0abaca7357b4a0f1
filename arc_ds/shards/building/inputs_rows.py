"""Reads the wanted columns of Parquet and Arrow files, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from arc_ds.errors import DataError
from arc_ds.shards.building.batches import BATCH_BYTES, Batch, Cursor, InputFile, import_library
from arc_ds.system.user_files import without_mark

if TYPE_CHECKING:
    import pyarrow

_MAX_ROWS = 4096
_READ_AHEAD = 1 << 20  # bytes of a column chunk that are buffered at once
_ARROW_FILE = b"ARROW1"  # Arrow's file format begins with it, its streaming format does not
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_row_batches(file: InputFile, columns: Sequence[str], start: Cursor) -> Iterator[Batch]:
    """Read the rows of a Parquet or Arrow file. A batch does not cross groups (see `Cursor`).

    columns: the columns to read. Columns that the file lacks are ignored. `a` also reads the columns `a.b` of a
        flattened table, and `a.b` the column `a`.
    start: the first batch to read.

    Raises DataError if the file has none of the columns or is damaged, or if pyarrow is not installed.
    """
    pyarrow = import_library(file, "pyarrow")
    try:
        if file.kind == "parquet":
            yield from _parquet_batches(file, columns, start)
        else:
            yield from _arrow_batches(file, columns, start)
    except (OSError, pyarrow.ArrowException) as error:
        name = file.kind.capitalize()
        raise DataError(f"{file.path}: cannot be read as {name} ({error}). Repair or leave out the file.") from error


def _parquet_batches(file: InputFile, columns: Sequence[str], start: Cursor) -> Iterator[Batch]:
    pyarrow_parquet = import_library(file, "pyarrow.parquet")
    with pyarrow_parquet.ParquetFile(file.path, buffer_size=_READ_AHEAD, pre_buffer=False) as parquet:
        wanted = _wanted(file, parquet.schema_arrow.names, columns)
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


def _arrow_batches(file: InputFile, columns: Sequence[str], start: Cursor) -> Iterator[Batch]:
    """Read Arrow's streaming format, which `datasets` writes, or its file format.

    A stream may end anywhere. One without an end mark, or with data after it, was probably cut short or joined from
    several, and its reader would lose rows silently.
    """
    pyarrow = import_library(file, "pyarrow")
    with pyarrow.memory_map(str(file.path)) as source:
        if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
            reader = pyarrow.ipc.open_file(source)
            num_groups = reader.num_record_batches
            groups = (reader.get_batch(idx) for idx in range(num_groups))
        else:
            source.seek(0)
            groups = reader = pyarrow.ipc.open_stream(source)
            num_groups = None
        wanted = _wanted(file, reader.schema.names, columns)
        first_row = 1
        for idx, group in enumerate(groups):
            if idx >= start.place:
                group = _plain(group.select(wanted))
                position = source.tell() if num_groups is None else file.num_bytes * (idx + 1) // num_groups
                size = max(1, min(_MAX_ROWS, BATCH_BYTES * len(group) // max(group.nbytes, 1)))
                for row in range(start.number if idx == start.place else 0, len(group), size):
                    # a copy: a slice that is sent to a worker takes its whole group along
                    rows = group.take(pyarrow.array(range(row, min(row + size, len(group)))))
                    yield Batch(
                        cursor=Cursor(idx, row),
                        content=rows,
                        position=position,
                        first_row=first_row + row,
                    )
            first_row += len(group)
        if num_groups is None:
            end = source.tell()
            source.seek(max(end - len(_END_OF_STREAM), 0))
            if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM or end != file.num_bytes:
                raise DataError(
                    f"{file.path}: expected an Arrow stream with an end mark as its last bytes, found "
                    f"{file.num_bytes - end} bytes after row {first_row - 1}. The file was cut short, or joined from "
                    "several: copy it again, or pass the files that it was joined from."
                )


def _wanted(file: InputFile, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    roots = {column.partition(".")[0] for column in columns}
    read_as = {name: without_mark(name) for name in names}
    wanted = [name for name in names if read_as[name] in columns or read_as[name].partition(".")[0] in roots]
    if not wanted:
        shown = ", ".join(columns[:6]) + (", …" if len(columns) > 6 else "")
        raise DataError(
            f"{file.path}: expected the columns {shown}; it has {', '.join(names)}. Name the column of "
            "texts (build: --text-field, or for questions --kind fine_tuning), or rename the columns."
        )
    return wanted


def _rows_at_once(group: Any, columns: list[str]) -> int:
    """The number of rows that take about `BATCH_BYTES`, given the average row size in the wanted columns."""
    prefixes = tuple(f"{name}." for name in columns)
    chunks = [group.column(idx) for idx in range(group.num_columns)]
    num_bytes = sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(prefixes))
    return max(1, min(_MAX_ROWS, BATCH_BYTES * group.num_rows // max(num_bytes, 1)))


def _plain(rows: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Convert dictionary and view columns to plain strings or bytes.

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
    if pyarrow.types.is_struct(stored):
        return pyarrow.struct(
            [stored.field(idx).with_type(_plain_type(stored.field(idx).type)) for idx in range(stored.num_fields)]
        )
    if pyarrow.types.is_list(stored) or pyarrow.types.is_large_list(stored):
        inner = _plain_type(stored.value_type)
        return stored if inner == stored.value_type else pyarrow.large_list(inner)
    if pyarrow.types.is_string_view(stored):
        return pyarrow.large_string()
    return pyarrow.large_binary() if pyarrow.types.is_binary_view(stored) else stored
