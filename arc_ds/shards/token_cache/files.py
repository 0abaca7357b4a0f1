"""The files of a token cache: names, formats, and checks that they belong to a set of shards.

A cache is the folder `tokens-FINGERPRINT` in the folder of manifest and indexes; FINGERPRINT stands for the first 16
digits of the tokenizer's fingerprint. The folder contains `cache.json`, a `lock` that a writer holds, and for each
shard two files:

- `NAME.ids`: for each record, the concatenated ids of all its texts (little-endian uint32), followed by one byte per
  id: the number of characters that end with it. The cumulative sums of these bytes are the token boundaries of a text.
- `NAME.texts`: three .npy arrays.
  1. uint64 [records + 1, 2]: index of the first id and of the first text of each record; the last row is the end.
  2. uint64 [records]: xxh64 of each record's bytes in `NAME.ids`.
  3. uint32 [texts]: number of ids of each text.
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
from arc_ds.shards.format import NPY_HEADERS, Manifest, ShardInfo
from arc_ds.shards.mappings import map_file
from arc_ds.shards.records import fine_tuning_record
from arc_ds.shards.storage.cache import KnownFile
from arc_ds.system.files import file_size
from arc_ds.system.user_files import refuse_pointer

FORMAT = "arc-ds-token-cache"
VERSION = 3
CACHE_FILE = "cache.json"
PREFIX = "tokens-"
TOKEN_BYTES = 5  # a 4-byte id and the 1-byte count of characters that end with it
MAX_CHARACTERS = 255  # of one token
MAX_INDEX_BYTES = 1 << 28
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedShard:
    """One shard of a cache.

    origin: see `origin_of`.
    records: number of records.
    ids: number of ids of all texts.
    left_out: number of unreadable records and of texts with a token of more than `MAX_CHARACTERS` characters. The
        cache does not contain them.
    ids_sha256: sha256 of the `.ids` file.
    texts_sha256: sha256 of the `.texts` file.
    texts_bytes: size of the `.texts` file in bytes.
    """

    origin: str
    records: int
    ids: int
    left_out: int
    ids_sha256: str
    texts_sha256: str
    texts_bytes: int

    def __post_init__(self) -> None:
        """Raise ValueError if a digest or number is invalid. Digests must be valid because they become paths."""
        if not all(_DIGEST.fullmatch(digest) for digest in (self.origin, self.ids_sha256, self.texts_sha256)):
            raise ValueError(f"{self}: expected sha256 digests")
        if any(type(number) is not int or number < 0 for number in (self.records, self.ids, self.texts_bytes)):
            raise ValueError(f"{self}: expected non-negative integers")

    def files(self, shard_name: str) -> tuple[KnownFile, KnownFile]:
        """The `.ids` file, and the `.texts` file with the positions of the texts in it. Addresses are file names."""
        return (
            KnownFile(ids_name(shard_name), self.ids * TOKEN_BYTES, self.ids_sha256),
            KnownFile(texts_name(shard_name), self.texts_bytes, self.texts_sha256),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIndex:
    """The content of `cache.json`.

    fingerprint: the complete fingerprint of the tokenizer.
    shards: the finished shards, by name.
    """

    fingerprint: str
    shards: Mapping[str, CachedShard]

    def to_json(self) -> str:
        shards = {name: asdict(shard) for name, shard in sorted(self.shards.items())}
        spec = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "shards": shards}
        return json.dumps(spec, indent=1) + "\n"


class ShardTexts(NamedTuple):
    """The three arrays of the `.texts` file of a shard (see the module's docstring)."""

    first: NDArray[np.uint64]
    checksums: NDArray[np.uint64]
    lengths: NDArray[np.uint32]


def origin_of(manifest: Manifest, shard: ShardInfo) -> str:
    """sha256 of everything that determines the texts of a shard: its tar, its index and the form of its records."""
    deciding = (shard.sha256, shard.index_sha256, shard.member, manifest.text_field, manifest.kind)
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def cache_name(fingerprint: str) -> str:
    """The name of the cache folder of a tokenizer."""
    return PREFIX + fingerprint[:16]


def ids_name(shard_name: str) -> str:
    return Path(shard_name).stem + ".ids"


def texts_name(shard_name: str) -> str:
    return Path(shard_name).stem + ".texts"


def texts_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of a record, in the order of the cache. Raises DataError like `fine_tuning_record`."""
    return (record["text"],) if "text" in record else fine_tuning_record(dict(record)).texts


def read_cache_index(folder: Path) -> CacheIndex:
    """Read `cache.json` from a cache folder.

    Raises DataError if it is missing, damaged or of another version, and StorageError if it cannot be read.
    """
    path = folder / CACHE_FILE
    try:
        return parse_cache_index(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. Make it readable for this user") from error


def parse_cache_index(raw: bytes, where: str) -> CacheIndex:
    """Parse the bytes of a `cache.json`. Raises DataError like `read_cache_index`.

    where: name of the file for error messages.
    """
    try:
        refuse_pointer(raw, where, DataError)
        spec = json.loads(str(raw, "utf-8"))
        if spec["format"] != FORMAT or spec["version"] != VERSION:
            raise DataError(f"{where}: expected format {FORMAT} version {VERSION}")
        shards = {str(name): CachedShard(**shard) for name, shard in spec["shards"].items()}
        return CacheIndex(fingerprint=str(spec["fingerprint"]), shards=shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: damaged ({type(error).__name__}: {error})") from error


def map_texts(file: IO[bytes], wanted: KnownFile, *, is_known: bool = False) -> ShardTexts:
    """Memory-map the `.texts` file of a shard.

    file: the open file.
    wanted: its expected size and checksum, from `cache.json`.
    is_known: the checksum was verified before, so only the size is checked.

    Raises DataError if the file cannot be read or does not match `wanted`.
    """
    try:
        raw = map_file(file)
        is_right = len(raw) == wanted.num_bytes and (is_known or hashlib.sha256(raw).hexdigest() == wanted.sha256)
        if not is_right or isinstance(raw, bytes):
            raise DataError(f"the size or sha256 of {file.name} does not match {CACHE_FILE}. Delete the file")
        return ShardTexts(*(_next_array(raw) for _ in range(3)))
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error


def _next_array(raw: mmap.mmap) -> NDArray[Any]:
    """The .npy array at the current position of a memory map, as a view; moves the position past the array."""
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


def find_fault(index: CacheIndex, manifest: Manifest, shard: ShardInfo, folder: Path | None = None) -> str | None:
    """Why a cache does not have the texts of the current version of a shard; None if it has them.

    folder: local folder of the cache, to check for missing files and wrong sizes.
    """
    cached = index.shards.get(shard.name)
    if cached is None:
        return f"unfinished: it lacks {shard.name}"
    if cached.origin != origin_of(manifest, shard) or cached.records != shard.samples:
        return f"stale: {shard.name} has since been built or indexed again"
    if folder is None:
        return None
    for file in cached.files(shard.name):
        found = file_size(folder / file.address)
        if found is None:
            return f"{file.address} is missing"
        if found != file.num_bytes:
            return f"{file.address} has {found} bytes, expected {file.num_bytes}"
    return None
