"""The documents of a batch of an input file, as fields; what cannot be read is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arc_ds.shards.building.batches import Batch, InputFile

if TYPE_CHECKING:
    import pyarrow


class LeftOutError(Exception):
    """A document gives no record. reason: the word it is counted under.

    fault: what is wrong with the document, None where it was merely filtered out.
    """

    def __init__(self, reason: str, fault: str | None = None) -> None:
        super().__init__(reason, fault)
        self.reason = reason
        self.fault = fault


def read_documents(
    file: InputFile, batch: Batch, *, text_field: str, max_bytes: int
) -> Iterator[tuple[int, dict[str, Any] | LeftOutError]]:
    """Number (line or row) and fields of each document, or why it has none. A text file has the one field `text_field`.

    Reasons: too_large (than `max_bytes`), not_utf8, not_json.
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
    """The fault of a document of `size` bytes."""
    fault = f"a document of {size} bytes; the limit is {max_bytes}. Split it, or raise the limit (--max-document-mib)."
    return LeftOutError("too_large", fault)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise LeftOutError("not_utf8", f"expected UTF-8: {error}. Mend it, or leave it out.") from error


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(_decoded(data))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and objects nested too deep
        raise LeftOutError("not_json", f"expected JSON: {error}. Mend or remove the line.") from error
    if not isinstance(fields, dict):
        got = type(fields).__name__
        raise LeftOutError("not_json", f"expected a JSON object, got {got}. Mend or remove the line.")
    return fields


def _read_rows(
    rows: pyarrow.RecordBatch, first_row: int, max_bytes: int
) -> Iterator[tuple[int, dict[str, Any] | LeftOutError]]:
    """Rows one by one: one that is no UTF-8 does not spoil the others, and a null is a field that is missing."""
    columns = dict(zip(rows.schema.names, rows.columns, strict=True))
    for idx in range(rows.num_rows):
        try:
            size = sum(column.slice(idx, 1).nbytes for column in columns.values())
            if size > max_bytes:
                raise too_large(size, max_bytes)
            values = {name: column[idx].as_py() for name, column in columns.items()}
        except UnicodeDecodeError as error:
            yield first_row + idx, LeftOutError("not_utf8", f"expected UTF-8: {error}. Mend or remove the row.")
        except LeftOutError as left_out:
            yield first_row + idx, left_out
        else:
            yield first_row + idx, {name: value for name, value in values.items() if value is not None}
