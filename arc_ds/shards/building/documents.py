"""Parses the documents of a batch of an input file into fields, and reports documents that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from arc_ds.shards.building.batches import Batch, InputFile, Line
from arc_ds.system.user_files import decode_user_text, without_mark_in_names

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
) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Yield the number (line or row) of each document, and a function that parses its fields.

    A text file has a single field, `text_field`. The function raises LeftOutError if the document cannot be read.
    Reasons: too_large (more than `max_bytes`), not_utf8, not_json.
    """
    if isinstance(batch.content, tuple):
        for line in batch.content:
            yield line.number, partial(_parse_line, file, line, text_field, max_bytes)
    else:
        columns = dict(zip(batch.content.schema.names, batch.content.columns, strict=True))
        for idx in range(batch.content.num_rows):
            yield batch.first_row + idx, partial(_parse_row, columns, idx, max_bytes)


def too_large(size: int, max_bytes: int) -> LeftOutError:
    """The fault of a document of `size` bytes that exceeds the limit of `max_bytes`."""
    fault = f"a document of {size} bytes; the limit is {max_bytes}. Split it, or raise the limit (--max-document-mib)."
    return LeftOutError("too_large", fault)


def _parse_line(file: InputFile, line: Line, text_field: str, max_bytes: int) -> dict[str, Any]:
    """The fields of a line of JSON, or of a text file."""
    if line.data is None:
        raise too_large(line.size, max_bytes)
    text = _decode(line.data, "document" if file.kind == "text" else "line", file.convert)
    if file.kind == "text":
        return {text_field: text}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and objects nested too deeply
        raise LeftOutError("not_json", f"expected JSON: {error}. Fix or remove the line.") from error
    if not isinstance(fields, dict):
        got = type(fields).__name__
        raise LeftOutError("not_json", f"expected a JSON object, got {got}. Fix or remove the line.")
    return without_mark_in_names(fields)


def _parse_row(columns: dict[str, pyarrow.Array], idx: int, max_bytes: int) -> dict[str, Any]:
    """The fields of a row. Invalid UTF-8 does not affect other rows."""
    size = sum(column.slice(idx, 1).nbytes for column in columns.values())
    if size > max_bytes:
        raise too_large(size, max_bytes)
    try:
        return without_mark_in_names({name: _texts_of(column[idx].as_py(), name) for name, column in columns.items()})
    except UnicodeDecodeError as error:
        raise LeftOutError("not_utf8", f"expected UTF-8: {error}. Fix or remove the row.") from error


def _texts_of(value: Any, column: str) -> Any:
    """The value with its bytes decoded. Some writers, Spark's older ones for example, store texts as binary columns."""
    if isinstance(value, bytes):
        return _decode(value, f"column {column!r}", "value.decode('{}') in Python, before you save the file")
    if isinstance(value, list):
        return [_texts_of(item, column) for item in value]
    if isinstance(value, dict):
        return {name: _texts_of(item, column) for name, item in value.items()}
    return value


def _decode(data: bytes, what: str, convert: str) -> str:
    """Decode the bytes of a document. `what` and `convert` are parts of the error."""
    not_utf8 = partial(LeftOutError, "not_utf8")
    remedy = "Fix or remove it, or leave it out: --on-error skip."
    return decode_user_text(data, f"the {what}", not_utf8, remedy=remedy, convert=convert)
