"""Parses the documents of a batch of an input file into fields, and reports documents that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arc_ds.shards.building.batches import Batch, InputFile

if TYPE_CHECKING:
    import pyarrow


class LeftOutError(Exception):
    """A document yields no record.

    reason: the key under which the document is counted.
    fault: the error in the document; None if a filter dropped it.
    """

    def __init__(self, reason: str, fault: str | None = None) -> None:
        super().__init__(reason, fault)
        self.reason = reason
        self.fault = fault


def read_documents(
    file: InputFile, batch: Batch, *, text_field: str, max_bytes: int
) -> Iterator[tuple[int, dict[str, Any] | LeftOutError]]:
    """Yield the number (line or row) and the fields of each document, or the reason why it has none.

    A text file has a single field, `text_field`. Reasons: too_large (more than `max_bytes`), not_utf8, not_json.
    """
    if not isinstance(batch.content, tuple):
        yield from _read_rows(batch.content, batch.first_row, max_bytes)
        return
    for line in batch.content:
        try:
            if line.data is None:
                raise too_large(line.size, max_bytes)
            fields = {text_field: _decoded(line.data)} if file.kind == "text" else _parsed(line.data)
        except LeftOutError as left_out:
            yield line.number, left_out
        else:
            yield line.number, fields


def too_large(size: int, max_bytes: int) -> LeftOutError:
    """The fault of a document of `size` bytes that exceeds the limit of `max_bytes`."""
    fault = f"a document of {size} bytes; the limit is {max_bytes}. Split it, or raise the limit (--max-document-mib)."
    return LeftOutError("too_large", fault)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise LeftOutError("not_utf8", f"expected UTF-8: {error}. Fix or remove it.") from error


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(_decoded(data))
    except (
        ValueError,
        RecursionError,
    ) as error:  # also for numbers of thousands of digits and for objects nested too deeply
        raise LeftOutError("not_json", f"expected JSON: {error}. Fix or remove the line.") from error
    if not isinstance(fields, dict):
        got = type(fields).__name__
        raise LeftOutError("not_json", f"expected a JSON object, got {got}. Fix or remove the line.")
    return fields


def _read_rows(
    rows: pyarrow.RecordBatch, first_row: int, max_bytes: int
) -> Iterator[tuple[int, dict[str, Any] | LeftOutError]]:
    """Convert rows one by one, so that a row with invalid UTF-8 does not affect the others. Nulls count as missing."""
    columns = dict(zip(rows.schema.names, rows.columns, strict=True))
    for idx in range(rows.num_rows):
        try:
            size = sum(column.slice(idx, 1).nbytes for column in columns.values())
            if size > max_bytes:
                raise too_large(size, max_bytes)
            values = {name: column[idx].as_py() for name, column in columns.items()}
        except UnicodeDecodeError as error:
            yield first_row + idx, LeftOutError("not_utf8", f"expected UTF-8: {error}. Fix or remove the row.")
        except LeftOutError as left_out:
            yield first_row + idx, left_out
        else:
            yield first_row + idx, {name: value for name, value in values.items() if value is not None}
