"""The shard format: names, the index beside each tar, and the manifest of a folder of shards (design 7).

A folder holds `shard-000000.tar` (a standard webdataset tar of `KEY.json` members), `shard-000000.idx` (an .npy array
of `INDEX_DTYPE`, one row a record) and so on, and one `manifest.json`. Tars that others wrote may lie elsewhere and
hold their records in other members (`arc-ds shards index`): the manifest says where and which.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import DataError

FORMAT = "arc-ds-shards"
VERSION = 3
_READABLE = (2, VERSION)  # version 2 counts no passages, and is the same in all else
MANIFEST = "manifest.json"
RecordKind = Literal["pretraining", "fine_tuning"]
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("length", "<i8"), ("xxh64", "<u8"), ("tokens", "<i4")])
# numpy reads a header of .npy through Python's syntax trees, which CPython before 3.11.8 and 3.12.2 can fail to make in
# several threads at once (SystemError).
NPY_HEADERS = threading.Lock()
REBUILD = "Build the shards again (arc-ds shards build) or copy them again."
_NAME = re.compile(r"[^/\\\0.][^/\\\0]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard of the manifest. bytes and sha256 are of the tar, index_sha256 of the index beside it.

    member: what the names of the members that hold records end with, after KEY and a dot: JSON objects, or plain text
    where it does not end in json; gzipped where it ends in .gz. location: path (absolute, or from the manifest's
    folder) or URL of the tar; None: beside the manifest. passage_tokens: for each number of passages that fine-tuning
    records have, in digits, the tokens of those passages; empty where they were not counted.
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
        """ValueError where a name or a digest is none, since they become paths, or a count of passages."""
        digests = (self.sha256, self.index_sha256)
        if not _NAME.fullmatch(self.name) or not all(_DIGEST.fullmatch(digest) for digest in digests):
            raise ValueError(f"the shard {self.name!r} has the digests {digests}: expected a file's name, and sha256")
        counts = self.passage_tokens.values()
        if not all(map(_NUMBER.fullmatch, self.passage_tokens)) or not all(type(count) is int for count in counts):
            raise ValueError(f"the shard {self.name!r} has the passage_tokens {self.passage_tokens}: expected numbers")
        if not 0 <= sum(counts) <= self.tokens or min(counts, default=0) < 0:
            raise ValueError(f"the shard {self.name!r} of {self.tokens} tokens has {sum(counts)} in its passages")

    @property
    def index_name(self) -> str:
        return Path(self.name).stem + ".idx"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """One input file: its digest, and what became of its documents.

    name: the path inside the folder that was given, or the file's name. records, tokens: what it gave. cut: documents
    that became several records. skipped: how many documents were left out for each reason, in sorted order.
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
    """What a folder of shards holds. Token counts are of the tokenizer with this fingerprint.

    kind: of its records. max_tokens, min_tokens: of pretraining records; fine-tuning records are never cut.
    text_field: the field of a pretraining record that holds its text (others' shards may call it something else).
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
        """Documents left out, by reason, over all sources."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.skipped)
        return dict(sorted(total.items()))

    @property
    def passage_tokens(self) -> dict[int, int]:
        """Tokens of the passages of the records that have so many, over all shards, numbers rising.

        Empty where a shard with records does not tell.
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
        """sha256 of the manifest: the same for the same records in the same shards, wherever they lie.

        What was counted in them decides nothing but who makes which sample, so it is left out, and this is the sum that
        manifests of version 2 have.
        """
        nowhere = asdict(replace(self, shards=tuple(replace(shard, location=None) for shard in self.shards)))
        for shard in nowhere["shards"]:
            del shard["passage_tokens"]
        return hashlib.sha256(_as_json({"version": 2, **nowhere}).encode()).hexdigest()


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **fields}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards; DataError where it is missing, damaged or contradicts itself."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: expected a folder of shards, found no {MANIFEST} in it. Check the path. {REBUILD}")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """The manifest of some bytes, which errors call `where`; DataError where it is damaged or contradicts itself."""
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
        raise DataError(f"{where}: says {manifest.samples} samples, its shards say {total}. {REBUILD}")
    return manifest


def read_index(folder: Path, shard: ShardInfo) -> NDArray[np.void]:
    """The index of a shard, INDEX_DTYPE [samples]; DataError where it is missing or not the manifest's."""
    path = folder / shard.index_name
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: the index of {shard.name} is missing. {REBUILD}") from error
    return parse_index(raw, shard, str(path))


def parse_index(raw: bytes, shard: ShardInfo, where: str) -> NDArray[np.void]:
    """The index of some bytes, which errors call `where`; DataError where it is not the manifest's."""
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
    """sha256 of a file as hex digits, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
