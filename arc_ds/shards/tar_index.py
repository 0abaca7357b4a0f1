"""Finding the records in a third-party tar. It can be any webdataset tar, with any other members."""

from __future__ import annotations

import mmap
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from arc_ds.errors import DataError
from arc_ds.shards.format import INDEX_DTYPE, RecordKind
from arc_ds.shards.members import decode_member
from arc_ds.shards.records import MAX_RECORD_BYTES, RecordError, fine_tuning_record
from arc_ds.system.user_files import check_downloaded
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


@dataclass(slots=True)
class TarContents:
    """Contents of a tar other than its records.

    num_keys: number of webdataset samples.
    ends: number of members by suffix.
    skipped: number of unusable samples by reason.
    named: descriptions of the first unusable members of each reason.
    passage_tokens: as in the shard's `ShardInfo`.
    """

    num_keys: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    passage_tokens: Counter[str] = field(default_factory=Counter)


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


def index_tar(path: Path, tokenizer: Tokenizer, form: RecordForm) -> tuple[NDArray[np.void], TarContents]:
    """Index a tar. Returns its rows, INDEX_DTYPE [records], in the order of the tar, and its other contents.

    Raises DataError if the tar is damaged, truncated or compressed: otherwise records after the damage would be lost
    silently.
    """
    contents = TarContents()
    rows: list[tuple[int, int, int, int]] = []
    check_downloaded(path, DataError)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. {_CURE}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        entries = _records(path, data, form, contents)
        while batch := list(islice(entries, _BATCH)):
            rows += _count_tokens(batch, tokenizer, contents)
    return np.array(rows, dtype=INDEX_DTYPE), contents


def _records(path: Path, data: mmap.mmap, form: RecordForm, contents: TarContents) -> Iterator[_RecordEntry]:
    """The usable records of a tar. Adds everything else that is found to the contents."""
    keys: set[str] = set()
    with_record: set[str] = set()
    for info in _members(path, data):
        parts = _KEY_AND_END.fullmatch(info.name)
        if not parts or info.isdir():
            continue
        key, end = parts.groups()
        keys.add(key)
        contents.ends[end.lower()] += 1
        if end.lower() != form.member:
            continue
        try:
            if key in with_record:
                raise RecordError("a second record of this key", "repeated")
            with_record.add(key)
            yield _read_record(data, info, form)
        except DataError as error:
            reason = error.reason if isinstance(error, RecordError) else "bad_record"
            contents.skipped[reason] += 1
            if contents.skipped[reason] <= _MAX_NAMED:
                contents.named.append(f"{path.name}, member {info.name} at byte {info.offset_data}: {error}")
    contents.num_keys = len(keys)
    if without := keys - with_record:
        contents.skipped["no_record"] = len(without)


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


def _read_record(data: mmap.mmap, info: tarfile.TarInfo, form: RecordForm) -> _RecordEntry:
    """Read the record of a member. Raises DataError if it is unusable."""
    if not info.isreg() or info.issparse():
        raise RecordError("a link or a sparse file", "no_file")
    if info.size > MAX_RECORD_BYTES:
        raise RecordError(f"a member of {info.size} bytes; expected at most {MAX_RECORD_BYTES}", "too_large")
    if not info.size:
        raise RecordError("no bytes", "empty")
    payload = data[info.offset_data : info.offset_data + info.size]
    record = decode_member(payload, member=form.member, text_field=form.text_field, kind=form.kind)
    alternatives: tuple[str, ...] = ()
    num_passages = 0
    if form.kind == "pretraining":
        texts: tuple[str, ...] = (record["text"],)
    else:
        question = fine_tuning_record(record)
        texts, alternatives = question.texts[: -len(question.answers)], question.answers
        num_passages = len(question.passages)
    if not any(text.strip() for text in texts):
        raise RecordError("only white space", "empty")
    return _RecordEntry(info.offset_data, info.size, xxhash.xxh64_intdigest(payload), texts, alternatives, num_passages)


def _count_tokens(
    batch: list[_RecordEntry], tokenizer: Tokenizer, contents: TarContents
) -> Iterator[tuple[int, int, int, int]]:
    """Index rows of a batch. A record's tokens are those of all its texts plus those of its longest alternative.

    Adds the tokens of the passages to the contents.
    """
    texts = [text for entry in batch for text in (*entry.texts, *entry.alternatives)]
    lengths = iter([len(ids) for ids in tokenizer.encode_batch(texts)])
    for entry in batch:
        counts = [next(lengths) for _ in entry.texts]
        tokens = sum(counts) + max((next(lengths) for _ in entry.alternatives), default=0)
        if entry.num_passages:
            contents.passage_tokens[str(entry.num_passages)] += sum(counts[: entry.num_passages])
        yield entry.offset, entry.length, entry.xxh64, tokens
