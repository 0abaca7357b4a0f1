"""Members of tars: how one that holds a record is decoded, and what its tar header says."""

from __future__ import annotations

import tarfile
import zlib
from typing import Any

from arc_ds.errors import DataError
from arc_ds.shards.format import RecordKind
from arc_ds.shards.records import MAX_RECORD_BYTES, decode_object, fine_tuning_record, pretraining_text

BLOCK = tarfile.BLOCKSIZE


def decode_member(payload: bytes, *, member: str, text_field: str, kind: RecordKind) -> dict[str, Any]:
    """The record of a kind in a member's bytes; DataError where there is none.

    member: what the member's name ends with. text_field: the field that holds the text of a pretraining record. A
    fine-tuning record comes without a `text`, which others' may have: by this field tasks tell one kind from the other.
    """
    if member.endswith(".gz"):
        payload = unzip(payload)
    record = decode_object(payload) if is_json(member) else {"text": decode_text(payload)}
    if kind == "fine_tuning":
        record.pop("text", None)
        fine_tuning_record(record)
    else:
        if text_field != "text" and text_field in record:
            record["text"] = record.pop(text_field)
        pretraining_text(record)
    return record


def is_json(member: str) -> bool:
    """Whether members whose names end with this hold JSON; else they hold text."""
    return member.removesuffix(".gz").rpartition(".")[2] == "json"


def decode_text(payload: bytes) -> str:
    """UTF-8, of no more bytes than a record may have; DataError on anything else."""
    if len(payload) > MAX_RECORD_BYTES:
        raise DataError(f"a text of {len(payload)} bytes; expected at most {MAX_RECORD_BYTES}. Cut it into records")
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"expected text in UTF-8: {error}") from error


def unzip(payload: bytes) -> bytes:
    """The content of a gzip file, which ends where it is larger than a record may be; DataError where it is damaged."""
    stream = zlib.decompressobj(wbits=31)
    try:
        content = stream.decompress(payload, MAX_RECORD_BYTES + 1)
    except zlib.error as error:
        raise DataError(f"expected gzip: {error}") from error
    if len(content) <= MAX_RECORD_BYTES and not stream.eof:
        raise DataError("expected gzip: it ends too early")
    return content


def name_of_header(header: bytes) -> str:
    """The name in a tar header of 512 bytes, of which an extended one in front may give the rest."""
    prefix = header[345:500] if header[257:263] == b"ustar\0" else b""
    parts = [part.split(b"\0")[0].decode("utf-8", "replace") for part in (prefix, header[:100])]
    return "/".join(part for part in parts if part) or "?"


def size_of_header(header: bytes) -> int | None:
    """The size in a tar header of 512 bytes; None where the header is none (its own checksum does not agree)."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None
