"""Records: what one member of a shard holds.

A record is a JSON object; pretraining needs its `text`. One record is one training sequence (design 7).
"""

from __future__ import annotations

import json
from typing import Any

from arc_ds.errors import DataError


def encode_record(record: dict[str, Any]) -> bytes:
    """A record as UTF-8 JSON, always the same bytes for the same record."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")


def decode_record(payload: bytes) -> dict[str, Any]:
    """The record of a member's bytes; DataError if it is no JSON object with a non-empty `text`."""
    record = decode_object(payload)
    if not text_of(record, "text"):
        raise DataError("expected a non-empty string in the field `text`, got an empty one")
    return record


def decode_object(payload: bytes) -> dict[str, Any]:
    """The JSON object of some bytes; DataError on anything else."""
    try:
        record = json.loads(payload)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"expected JSON in UTF-8: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got {type(record).__name__}")
    return record


def text_of(record: dict[str, Any], field: str) -> str:
    """A field's text; DataError where it is missing, no string, or holds lone surrogates (JSON's \\ud800 can)."""
    text = record.get(field)
    if not isinstance(text, str):
        got = type(text).__name__ if field in record else f"the fields {sorted(record)}"
        raise DataError(f"expected a string in the field {field!r}, got {got}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the field {field!r} holds characters that UTF-8 cannot encode: {error}") from error
    return text
