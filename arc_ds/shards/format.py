"""The shard format: file names, the index of each tar, and the manifest of a folder of shards.

A folder holds `shard-000000.tar` (a standard webdataset tar of `KEY.json` members), `shard-000000.idx` (an .npy array
of `INDEX_DTYPE`, one row per record) and so on, and one `manifest.json`. Third-party tars may be stored elsewhere and
keep their records in other members (`arc-ds shards index`); the manifest then records the location and the member name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import DataError
from arc_ds.system.user_files import refuse_pointer

FORMAT = "arc-ds-shards"
VERSION = 3
_READABLE = (2, VERSION)  # version 2 lacks passage counts and is otherwise identical
MANIFEST = "manifest.json"
RecordKind = Literal["pretraining", "fine_tuning"]
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("length", "<i8"), ("xxh64", "<u8"), ("tokens", "<i4")])
# numpy parses .npy headers with Python's `ast`, which can raise SystemError in concurrent threads before CPython 3.11.8
# and 3.12.2.
NPY_HEADERS = threading.Lock()
REBUILD = "Build the shards again (arc-ds shards build) or copy them again."
_NAME = re.compile(r"[^/\\\0.][^/\\\0]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard of the manifest.

    name: file name of the tar.
    samples: number of records.
    tokens: number of tokens of all records.
    bytes: size of the tar.
    sha256: digest of the tar.
    index_sha256: digest of its index.
    member: suffix of the members that hold records, after KEY and a dot. The members are JSON objects if it ends in
        json and plain text otherwise; they are gzipped if it ends in .gz.
    location: path (absolute, or relative to the manifest's folder) or URL of the tar; None if the tar is next to the
        manifest.
    passage_tokens: passage tokens of the fine-tuning records, keyed by their number of passages (in digits); empty if
        they were not counted.
    """

    name: str
    samples: int
    tokens: int
    bytes: int
    sha256: str
    index_sha256: str
    member: str = "json"
    location: str | None = None
    passage_tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid name or digest (both become paths) or invalid passage counts."""
        digests = (self.sha256, self.index_sha256)
        if not _NAME.fullmatch(self.name) or not all(_DIGEST.fullmatch(digest) for digest in digests):
            raise ValueError(f"the shard {self.name!r} has the digests {digests}: expected a file name and sha256")
        counts = self.passage_tokens.values()
        if not all(map(_NUMBER.fullmatch, self.passage_tokens)) or not all(type(count) is int for count in counts):
            raise ValueError(f"the shard {self.name!r} has the passage_tokens {self.passage_tokens}: expected numbers")
        if not 0 <= sum(counts) <= self.tokens or min(counts, default=0) < 0:
            raise ValueError(f"the shard {self.name!r} of {self.tokens} tokens has {sum(counts)} passage tokens")

    @property
    def index_name(self) -> str:
        return Path(self.name).stem + ".idx"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """One input file of a build, with counts of its documents.

    name: path relative to the input folder, or the file's name.
    bytes: size of the file.
    sha256: digest of the file.
    documents: number of documents read.
    records: number of records made from them.
    tokens: number of tokens of these records.
    cut: number of documents that were cut into several records.
    skipped: number of documents left out, by reason, in sorted order.
    """

    name: str
    bytes: int
    sha256: str
    documents: int
    records: int
    tokens: int
    cut: int
    skipped: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of a folder of shards.

    samples: number of records.
    tokens: number of tokens of all records.
    max_tokens: upper bound on the tokens of a pretraining record; fine-tuning records are never cut.
    min_tokens: lower bound on the tokens of a pretraining record.
    tokenizer_fingerprint: fingerprint of the tokenizer that counted all tokens.
    shards: the shards, in the order of their records.
    sources: the input files.
    kind: kind of the records.
    text_field: field of a pretraining record that holds its text (third-party shards may use another name).
    """

    samples: int
    tokens: int
    max_tokens: int
    min_tokens: int
    tokenizer_fingerprint: str
    shards: tuple[ShardInfo, ...]
    sources: tuple[SourceInfo, ...]
    kind: RecordKind = "pretraining"
    text_field: str = "text"

    @property
    def skipped(self) -> dict[str, int]:
        """Number of documents left out, by reason, over all sources."""
        return total_skipped(self.sources)

    @property
    def passage_tokens(self) -> dict[int, int]:
        """Passage tokens over all shards, keyed by the number of passages of a record, in ascending order.

        Empty if any shard with records has no such counts.
        """
        total: Counter[int] = Counter()
        for shard in self.shards:
            if shard.samples and not shard.passage_tokens:
                return {}
            total.update({int(number): tokens for number, tokens in shard.passage_tokens.items()})
        return dict(sorted(total.items()))

    def to_json(self) -> str:
        return _as_json({"version": VERSION, **asdict(self)})

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest, equal for the same records in the same shards regardless of their location.

        It omits the passage counts, which affect only which worker makes which sample. It therefore equals the digest
        of a version 2 manifest.
        """
        nowhere = asdict(replace(self, shards=tuple(replace(shard, location=None) for shard in self.shards)))
        for shard in nowhere["shards"]:
            del shard["passage_tokens"]
        return hashlib.sha256(_as_json({"version": 2, **nowhere}).encode()).hexdigest()


def total_skipped(sources: Iterable[SourceInfo]) -> dict[str, int]:
    """Number of documents left out, by reason, over some sources."""
    total = sum((Counter(source.skipped) for source in sources), Counter[str]())
    return dict(sorted(total.items()))


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **fields}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of shards; DataError if it is missing, damaged or inconsistent."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: expected a folder of shards, found no {MANIFEST} in it. Check the path. {REBUILD}")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Parse a manifest; DataError if it is damaged or inconsistent. where: the name used in error messages."""
    refuse_pointer(raw, where, DataError)
    try:
        spec: dict[str, Any] = json.loads(str(raw, "utf-8"))
        if spec.pop("format") != FORMAT or spec.pop("version") not in _READABLE:
            raise DataError(f"{where}: expected format {FORMAT} version {VERSION}. {REBUILD}")
        shards = tuple(ShardInfo(**shard) for shard in spec.pop("shards"))
        sources = tuple(SourceInfo(**source) for source in spec.pop("sources"))
        manifest = Manifest(**spec, shards=shards, sources=sources)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: damaged ({type(error).__name__}: {error}). {REBUILD}") from error
    total = sum(shard.samples for shard in manifest.shards)
    if total != manifest.samples or total == 0:
        raise DataError(f"{where}: has {manifest.samples} samples, but its shards have {total}. {REBUILD}")
    return manifest


def read_index(folder: Path, shard: ShardInfo) -> NDArray[np.void]:
    """Read the index of a shard, INDEX_DTYPE [samples]; DataError if it is missing or does not match the manifest."""
    path = folder / shard.index_name
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: the index of {shard.name} is missing. {REBUILD}") from error
    return parse_index(raw, shard, str(path))


def write_index(path: Path, rows: Sequence[tuple[int, int, int, int]] | NDArray[np.void]) -> str:
    """Write an index and sync it to the disk. Returns its sha256."""
    with path.open("wb") as file:
        np.save(file, np.asarray(rows, dtype=INDEX_DTYPE), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return sha256_of_file(path)


def parse_index(raw: bytes, shard: ShardInfo, where: str) -> NDArray[np.void]:
    """Parse an index; DataError if it does not match the manifest. where: the name used in error messages."""
    refuse_pointer(raw, where, DataError)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != shard.index_sha256:
        raise DataError(f"{where}: expected sha256 {shard.index_sha256[:16]}…, got {digest[:16]}…. {REBUILD}")
    try:
        with NPY_HEADERS:
            index = np.load(io.BytesIO(raw), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{where}: expected an .npy array ({error}). {REBUILD}") from error
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise DataError(f"{where}: expected {shard.samples} rows, got {index.shape} of {index.dtype}. {REBUILD}")
    return index


def sha256_of_file(path: Path) -> str:
    """sha256 of a file as hex digits. Reads the file in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
