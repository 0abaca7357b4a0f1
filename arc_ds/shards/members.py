"""Tar members: decoding the record that a member holds, and reading its tar header."""

from __future__ import annotations

import tarfile
import zlib
from typing import Any

from arc_ds.shards.format import RecordKind
from arc_ds.shards.records import (
    MAX_RECORD_BYTES,
    RecordError,
    decode_object,
    decode_payload,
    fine_tuning_record,
    pretraining_text,
    value_of,
)

BLOCK = tarfile.BLOCKSIZE


def decode_member(payload: bytes, *, member: str, text_field: str, kind: RecordKind) -> dict[str, Any]:
    """Decode the record in a member. Raises DataError if it holds no record of this kind.

    A field `text` of a fine-tuning record (third-party records may have one) is dropped, because tasks distinguish the
    two kinds of records by this field.

    payload: bytes of the member.
    member: suffix of the member's name. The member is JSON if it ends in json or json.gz, and plain text otherwise.
    text_field: field that holds the text of a pretraining record.
    kind: kind of the record.
    """
    if member.endswith(".gz"):
        payload = _unzip(payload)
    is_json = member.removesuffix(".gz").rpartition(".")[2] == "json"
    record = decode_object(payload) if is_json else {"text": _decode_text(payload)}
    if kind == "fine_tuning":
        record.pop("text", None)
        fine_tuning_record(record)
    else:
        if text_field in record:
            record["text"] = record.pop(text_field)
        elif text_field.partition(".")[0] in record:
            record["text"] = value_of(record, text_field)
        record["text"] = pretraining_text(record)
    return record


def _decode_text(payload: bytes) -> str:
    """Decode UTF-8; RecordError if it is invalid or longer than MAX_RECORD_BYTES."""
    if len(payload) > MAX_RECORD_BYTES:
        words = f"a text of {len(payload)} bytes; expected at most {MAX_RECORD_BYTES}. Cut it into records"
        raise RecordError(words, "too_large")
    return decode_payload(payload)


def _unzip(payload: bytes) -> bytes:
    """Decompress gzip, at most MAX_RECORD_BYTES + 1 bytes; RecordError if it is damaged."""
    stream = zlib.decompressobj(wbits=31)
    try:
        content = stream.decompress(payload, MAX_RECORD_BYTES + 1)
    except zlib.error as error:
        raise RecordError(f"expected gzip: {error}", "not_gzip") from error
    if len(content) <= MAX_RECORD_BYTES and not stream.eof:
        raise RecordError("expected gzip: it ends too early", "not_gzip")
    return content


def parse_header(header: bytes) -> tarfile.TarInfo | None:
    """Name and size of a member from its tar header of 512 bytes; None if the header is damaged.

    A long name may continue in an extended header before it.
    """
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.HeaderError:
        return None
