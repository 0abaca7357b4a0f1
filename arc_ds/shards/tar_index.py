"""Finding the records in a third-party tar. It can be any webdataset tar, with any other members."""

from __future__ import annotations

import mmap
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from arc_ds.errors import DataError
from arc_ds.shards.format import INDEX_DTYPE, RecordKind
from arc_ds.shards.members import decode_member, decode_text, is_json, unzip
from arc_ds.shards.records import MAX_RECORD_BYTES, decode_object, fine_tuning_record, pretraining_text
from arc_ds.tokenizers import Tokenizer

_KEY_AND_END = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # as webdataset splits a member's name
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_CURE = "Copy it again, or leave it out."
_BATCH = 256  # records per tokenizer call
_MAX_NAMED = 5  # members logged per reason


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordForm:
    """How a tar stores its records.

    member: suffix of the names of their members, after KEY and a dot.
    text_field: field that holds the text of a pretraining record.
    kind: kind of the records.
    """

    member: str = "json"
    text_field: str = "text"
    kind: RecordKind = "pretraining"


@dataclass(slots=True, kw_only=True)
class TarContents:
    """Contents of a tar other than its records.

    keys: keys of the webdataset samples.
    with_record: keys that have a member with the right suffix.
    ends: number of members by suffix.
    skipped: number of unusable members by reason.
    named: descriptions of the first unusable members of each reason.
    passage_tokens: as in the shard's `ShardInfo`.
    """

    keys: set[str] = field(default_factory=set)
    with_record: set[str] = field(default_factory=set)
    ends: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    passage_tokens: Counter[str] = field(default_factory=Counter)

    def skip(self, reason: str, what: str) -> None:
        self.skipped[reason] += 1
        if self.skipped[reason] <= _MAX_NAMED:
            self.named.append(what)


class _RecordEntry(NamedTuple):
    """A record in the tar.

    offset: position of its bytes in the tar.
    length: number of its bytes.
    xxh64: checksum of its bytes.
    texts: texts that all count towards its tokens.
    alternatives: texts of which only the longest counts (answers).
    num_passages: number of leading `texts` that are passages of a fine-tuning record.
    """

    offset: int
    length: int
    xxh64: int
    texts: tuple[str, ...]
    alternatives: tuple[str, ...]
    num_passages: int


class _UnusableError(Exception):
    """A member is not a usable record, for one of the counted reasons."""

    def __init__(self, reason: str, what: object) -> None:
        super().__init__(str(what))
        self.reason = reason


def index_tar(path: Path, tokenizer: Tokenizer, form: RecordForm) -> tuple[NDArray[np.void], TarContents]:
    """Index a tar. Returns its rows, INDEX_DTYPE [records], in the order of the tar, and the findings.

    Raises DataError if the tar is damaged, truncated or compressed: otherwise records after the damage would be lost
    silently.
    """
    findings = TarContents()
    rows: list[tuple[int, int, int, int]] = []
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. {_CURE}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        batch: list[_RecordEntry] = []
        for found in _records(path, data, form, findings):
            batch.append(found)
            if len(batch) == _BATCH:
                rows += _count_tokens(batch, tokenizer, findings)
                batch = []
        rows += _count_tokens(batch, tokenizer, findings)
    return np.array(rows, dtype=INDEX_DTYPE), findings


def _records(path: Path, data: mmap.mmap, form: RecordForm, findings: TarContents) -> Iterator[_RecordEntry]:
    """The usable records of a tar."""
    for info in _members(path, data):
        parts = _KEY_AND_END.fullmatch(info.name)
        if not parts or info.isdir():
            continue
        key, end = parts.groups()
        findings.keys.add(key)
        findings.ends[end.lower()] += 1
        if end.lower() != form.member:
            continue
        what = f"{path.name}, member {info.name} at byte {info.offset_data}"
        try:
            if key in findings.with_record:
                raise _UnusableError("repeated", "a second record of this key")
            findings.with_record.add(key)
            yield _found(data, info, form)
        except _UnusableError as error:
            findings.skip(error.reason, f"{what}: {error}")


def _members(path: Path, data: mmap.mmap) -> Iterator[tarfile.TarInfo]:
    """All members of a tar. Raises DataError after the last one if data follow the end of the archive.

    `tarfile` treats a damaged header, or a hole of zeros, as the end of the archive.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                if info.isreg() and info.offset_data + info.size > len(data):
                    raise DataError(
                        f"{path} is cut short: its member {info.name} should end at byte "
                        f"{info.offset_data + info.size}, the file ends at {len(data)}. {_CURE}"
                    )
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every member in memory
                yield info
            end = tar.offset
    except tarfile.TarError as error:
        for magic, name in _COMPRESSED.items():
            if data[: len(magic)] == magic:
                raise DataError(
                    f"{path} is compressed ({name}), so its records cannot be reached one by one. Decompress it first."
                ) from error
        raise DataError(f"{path} cannot be read as a tar: {error}. {_CURE}") from error
    for begin in range(end, len(data), 1 << 20):
        piece = data[begin : begin + (1 << 20)]
        if rest := piece.lstrip(b"\0"):
            raise DataError(
                f"{path} is damaged: after its last readable member, at byte {end}, more data follow at byte "
                f"{begin + len(piece) - len(rest)}. {_CURE} (If it was joined with cat, join the tars with "
                "tar --concatenate instead.)"
            )


def _found(data: mmap.mmap, info: tarfile.TarInfo, form: RecordForm) -> _RecordEntry:
    if not info.isreg() or info.issparse():
        raise _UnusableError("no_file", "a link or a sparse file")
    if info.size > MAX_RECORD_BYTES:
        raise _UnusableError("too_large", f"a member of {info.size} bytes; expected at most {MAX_RECORD_BYTES}")
    payload = data[info.offset_data : info.offset_data + info.size]
    record = _decode(payload, form)
    alternatives: tuple[str, ...] = ()
    num_passages = 0
    if form.kind == "pretraining":
        texts: tuple[str, ...] = (pretraining_text(record),)
    else:
        made = fine_tuning_record(record)
        texts, alternatives = made.texts[: -len(made.answers)], made.answers
        num_passages = len(made.passages)
    if not any(text.strip() for text in texts):
        raise _UnusableError("empty", "only white space")
    return _RecordEntry(info.offset_data, info.size, xxhash.xxh64_intdigest(payload), texts, alternatives, num_passages)


def _decode(payload: bytes, form: RecordForm) -> dict[str, Any]:
    """Decode a member step by step, so that each fault gets its own reason."""
    if not payload:
        raise _UnusableError("empty", "no bytes")
    with _unusable_as("not_gzip"):
        content = unzip(payload) if form.member.endswith(".gz") else payload
    with _unusable_as("not_utf8"):
        decode_text(content)
    if is_json(form.member):
        with _unusable_as("not_json"):
            decode_object(content)
    with _unusable_as("bad_record"):
        return decode_member(payload, member=form.member, text_field=form.text_field, kind=form.kind)


@contextmanager
def _unusable_as(reason: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise _UnusableError(reason, error) from error


def _count_tokens(
    batch: list[_RecordEntry], tokenizer: Tokenizer, findings: TarContents
) -> list[tuple[int, int, int, int]]:
    """Index rows of a batch. A record's tokens are those of all its texts plus those of its longest alternative.

    Adds the tokens of the passages to the findings.
    """
    texts = [text for found in batch for text in (*found.texts, *found.alternatives)]
    lengths = iter([len(ids) for ids in tokenizer.encode_batch(texts)] if texts else [])
    rows = []
    for found in batch:
        counts = [next(lengths) for _ in found.texts]
        tokens = sum(counts) + max((next(lengths) for _ in found.alternatives), default=0)
        if found.num_passages:
            findings.passage_tokens[str(found.num_passages)] += sum(counts[: found.num_passages])
        rows.append((found.offset, found.length, found.xxh64, tokens))
    return rows
