"""The files of a token cache: their names, what they hold, and whether they are those of a set of shards (design 7).

A cache is the folder `tokens-FINGERPRINT` in the folder of manifest and indexes (the first 16 digits of the tokenizer's
fingerprint). It holds `cache.json`, and for each shard `NAME.ids` and `NAME.texts`. The first has for each record the
ids of all its texts end to end, as little-endian uint32, and behind them for each id, as one byte, how many characters
end with it (a text's boundaries are their sums). The second is three .npy arrays: the first id and the first text of
each record, uint64 [records + 1, 2], the last row being the end; xxh64 of what `NAME.ids` has of each record, uint64
[records]; and the number of ids of each text, uint32 [texts]. A `lock` is held by who writes the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.files import SideFile
from arc_ds.shards.format import NPY_HEADERS, Manifest, ShardInfo
from arc_ds.shards.mappings import map_file
from arc_ds.shards.records import fine_tuning_record

FORMAT = "arc-ds-token-cache"
VERSION = 3
CACHE_FILE = "cache.json"
PREFIX = "tokens-"
TOKEN_BYTES = 5  # an id, and the characters that end with it
MAX_CHARACTERS = 255  # of one token
MAX_INDEX_BYTES = 1 << 28
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedShard:
    """One shard of a cache. origin: see `origin_of`. ids: how many, of all texts together.
    left_out: records or texts that are not in it, because they cannot be read or a token has too many characters."""

    origin: str
    records: int
    ids: int
    left_out: int
    ids_sha256: str
    texts_sha256: str
    texts_bytes: int

    def __post_init__(self) -> None:
        """ValueError where a digest or a number is none: digests become paths."""
        if not all(_DIGEST.fullmatch(digest) for digest in (self.origin, self.ids_sha256, self.texts_sha256)):
            raise ValueError(f"{self}: expected digests by sha256")
        if any(type(number) is not int or number < 0 for number in (self.records, self.ids, self.texts_bytes)):
            raise ValueError(f"{self}: expected numbers from 0")

    def files(self, shard_name: str) -> tuple[SideFile, SideFile]:
        """The file of the ids, and the one that says where the texts stand in it."""
        return (
            SideFile(ids_name(shard_name), self.ids * TOKEN_BYTES, self.ids_sha256),
            SideFile(texts_name(shard_name), self.texts_bytes, self.texts_sha256),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIndex:
    """What `cache.json` says: the whole fingerprint of the tokenizer, and the shards that are done, by name."""

    fingerprint: str
    shards: Mapping[str, CachedShard]

    def to_json(self) -> str:
        shards = {name: asdict(shard) for name, shard in sorted(self.shards.items())}
        spec = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "shards": shards}
        return json.dumps(spec, indent=1) + "\n"


class ShardTexts(NamedTuple):
    """The `.texts` file of a shard (see above)."""

    first: NDArray[np.uint64]
    checksums: NDArray[np.uint64]
    lengths: NDArray[np.uint32]


def origin_of(manifest: Manifest, shard: ShardInfo) -> str:
    """sha256 of what decides the texts of a shard: its tar, its records' places in it and their form."""
    deciding = (shard.sha256, shard.index_sha256, shard.member, manifest.text_field, manifest.kind)
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def is_of(cached: CachedShard, manifest: Manifest, shard: ShardInfo) -> bool:
    """Whether this is what is cached of a shard as it is now."""
    return cached.origin == origin_of(manifest, shard) and cached.records == shard.samples


def cache_name(fingerprint: str) -> str:
    """The name of the folder of a tokenizer's cache."""
    return PREFIX + fingerprint[:16]


def ids_name(shard_name: str) -> str:
    return Path(shard_name).stem + ".ids"


def texts_name(shard_name: str) -> str:
    return Path(shard_name).stem + ".texts"


def texts_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of a record that are cached, in the order they are cached in; DataError as for `records`."""
    return (record["text"],) if "text" in record else fine_tuning_record(dict(record)).texts


def read_cache_index(folder: Path) -> CacheIndex:
    """What `cache.json` of a cache's folder says; DataError where it is missing, damaged or of another version,
    StorageError where it cannot be read."""
    path = folder / CACHE_FILE
    try:
        return parse_cache_index(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. Make it readable for this user") from error


def parse_cache_index(raw: bytes, where: str) -> CacheIndex:
    """What the bytes of a `cache.json`, which errors call `where`, say; DataError as `read_cache_index`."""
    try:
        spec = json.loads(str(raw, "utf-8"))
        if spec["format"] != FORMAT or spec["version"] != VERSION:
            raise DataError(f"{where}: expected format {FORMAT} version {VERSION}")
        shards = {str(name): CachedShard(**shard) for name, shard in spec["shards"].items()}
        return CacheIndex(fingerprint=str(spec["fingerprint"]), shards=shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: damaged ({type(error).__name__}: {error})") from error


def map_texts(file: IO[bytes], wanted: SideFile, *, is_known: bool = False) -> ShardTexts:
    """The `.texts` file of a shard, mapped; DataError where it cannot be read or is not the one of `cache.json`.

    is_known: its sum was found right before, so that its size says enough.
    """
    try:
        raw = map_file(file)
        is_right = len(raw) == wanted.num_bytes and (is_known or hashlib.sha256(raw).hexdigest() == wanted.sha256)
        if not is_right or isinstance(raw, bytes):
            raise DataError(f"the sha256 of {file.name} is not the one in {CACHE_FILE}. Delete it")
        return ShardTexts(*(_next_array(raw) for _ in range(3)))
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error


def _next_array(raw: mmap.mmap) -> NDArray[Any]:
    """The .npy array at a mapping's position, as a view of it; the position moves behind it."""
    with NPY_HEADERS:
        np.lib.format.read_magic(raw)
        shape, _, dtype = np.lib.format.read_array_header_1_0(raw)
    array = np.frombuffer(raw, dtype=dtype, count=math.prod(shape), offset=raw.tell()).reshape(shape)
    raw.seek(array.nbytes, os.SEEK_CUR)
    return array


def dump_texts(texts: ShardTexts) -> bytes:
    """The content of a `.texts` file."""
    buffer = io.BytesIO()
    for array in texts:
        np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def mismatch(manifest: Manifest, index: CacheIndex, fingerprint: str) -> str | None:
    """Why a cache is not that of these shards and this tokenizer, None where it is."""
    if index.fingerprint != fingerprint:
        return f"it is of the tokenizer {index.fingerprint[:16]}…, not {fingerprint[:16]}…"
    for shard in manifest.shards:
        cached = index.shards.get(shard.name)
        if cached is None:
            return f"it is unfinished, {shard.name} is not in it"
        if not is_of(cached, manifest, shard):
            return f"it is stale, {shard.name} has been built or indexed again since"
    return None


def wrong_size(folder: Path, cached: CachedShard, shard_name: str) -> str | None:
    """What is wrong with the sizes of a cached shard's files in a local folder, None where nothing is."""
    for file in cached.files(shard_name):
        path = folder / file.name
        if not path.is_file():
            return f"{file.name} is missing"
        if (found := path.stat().st_size) != file.num_bytes:
            return f"{file.name} has {found} bytes, expected {file.num_bytes}"
    return None
