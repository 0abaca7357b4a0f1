"""Reading shards through their indexes, memory-mapped."""

from __future__ import annotations

import bisect
import mmap
import os
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.files import locate
from arc_ds.shards.format import INDEX_DTYPE, read_index
from arc_ds.shards.mappings import MappedFiles, map_file
from arc_ds.shards.members import BLOCK, decode_member, parse_header
from arc_ds.shards.prefetcher import Prefetcher
from arc_ds.shards.storage.cache import ShardCache

# One row of an index. Unpacking it from bytes is three times as fast as reading the fields of a numpy row.
_ROW = struct.Struct("<qqQi")
assert _ROW.size == INDEX_DTYPE.itemsize, "the row and the dtype have the same layout"


class ShardSet:
    """A set of shards whose records are numbered from 0 across all shards.

    Opening it checks the manifest, every index and the size of every local tar, and reads no record. Each process maps
    tars and indexes, and fetches remote tars, on first use. The object can therefore be forked or pickled, and its size
    does not grow with the number of records.

    name: path or URL, as shown in messages.
    folder: local folder of the manifest and the indexes.
    """

    def __init__(self, path: str | Path, *, cache: ShardCache | None = None) -> None:
        """
        path: a folder of shards or its URL.
        cache: cache for the tars of a URL; None for the cache of an empty config.

        Raises DataError if the set is incomplete (missing or truncated files, or a wrong index), StorageError if it
        cannot be reached, and ConfigError if a shard is larger than the cache.
        """
        self.files = locate(path, cache)
        self.files.check()
        self.name = self.files.name
        self.folder = self.files.folder
        self.manifest = self.files.manifest
        self.fingerprint = self.manifest.fingerprint
        self.shard_sizes = np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)
        self._first = (np.cumsum(self.shard_sizes) - self.shard_sizes).tolist()
        self._open_nothing()

    def _open_nothing(self) -> None:
        self._indexes = MappedFiles[memoryview]()
        largest_bytes = max(shard.bytes for shard in self.manifest.shards)
        self._tars = MappedFiles[mmap.mmap | bytes](num_bytes=largest_bytes, cache=self.files.cache)
        self._prefetcher: Prefetcher | None = None

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_indexes", "_tars", "_prefetcher", "num_tokens")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_nothing()

    @cached_property
    def num_tokens(self) -> NDArray[np.int32]:
        """Tokens of every record, int32 [records], read on first use. For a few records, use `tokens`."""
        return np.concatenate([read_index(self.folder, shard)["tokens"] for shard in self.manifest.shards])

    def tokens(self, idx: int) -> int:
        """Tokens of one record, counted by the tokenizer that the shards were built with."""
        return self._row(idx)[1][3]

    def record(self, idx: int) -> dict[str, Any]:
        """Read record `idx` and verify its checksum.

        Raises DataError with shard, member and offset if the record is damaged, and StorageError if its shard was
        deleted or cannot be fetched.
        """
        shard_idx, (offset, length, checksum, _) = self._row(idx)
        manifest = self.manifest
        tar, shard = self._tars.get(shard_idx, self._map_tar), manifest.shards[shard_idx]
        payload = tar[offset : offset + length]
        try:
            if len(payload) != length or xxhash.xxh64_intdigest(payload) != checksum:
                raise DataError("the checksum does not match the index")
            return decode_member(payload, member=shard.member, text_field=manifest.text_field, kind=manifest.kind)
        except DataError as error:
            header = parse_header(tar[max(offset - BLOCK, 0) : offset])
            place = f"{self.files.shown(shard)}, member {header.name if header else '?'} at byte {offset}"
            reason = f"{str(error).rstrip('.')}. {self.files.cure(shard)}"
            raise DataError(f"{place}: {reason} Or set data.on_error: skip.") from error

    def prefetch(self, shard_idxs: Sequence[int]) -> None:
        """Start fetching these shards in order, if the set is remote, and return at once.

        They replace the shards that are still queued. A failure is only logged: the reader of the shard retries.
        """
        if self.files.cache is None:
            return
        if self._prefetcher is None or self._prefetcher.process != os.getpid():
            self._prefetcher = Prefetcher(self.files, self.files.cache.max_bytes)
        self._prefetcher.want(shard_idxs)

    def place(self, idx: int) -> tuple[int, int]:
        """The shard of a record, and its number in the shard."""
        if not 0 <= idx < self.manifest.samples:
            raise DataError(f"{self.name}: record {idx} does not exist; expected 0 to {len(self) - 1}.")
        shard_idx = bisect.bisect_right(self._first, idx) - 1
        return shard_idx, idx - self._first[shard_idx]

    def _row(self, idx: int) -> tuple[int, tuple[int, int, int, int]]:
        """The shard of a record, and its index row: offset, length, xxh64, tokens."""
        shard_idx, number = self.place(idx)
        row = _ROW.unpack_from(self._indexes.get(shard_idx, self._index_rows), number * _ROW.size)
        return shard_idx, row  # type: ignore[return-value]

    def _index_rows(self, shard_idx: int) -> memoryview:
        """The rows of an index, as bytes. Opening the set has verified its checksum."""
        shard = self.manifest.shards[shard_idx]
        path = self.folder / shard.index_name
        try:
            with path.open("rb") as file:
                raw = memoryview(map_file(file))
        except OSError as error:
            raise StorageError(f"{path} cannot be opened: {error.strerror}. Is its disk still mounted?") from error
        rows = raw[max(len(raw) - shard.samples * _ROW.size, 0) :]
        if len(rows) != shard.samples * _ROW.size:
            raise StorageError(
                f"{path} has {len(raw)} bytes, fewer than before. Was it rebuilt? Start again when it is complete."
            )
        return rows

    def _map_tar(self, shard_idx: int) -> mmap.mmap | bytes:
        """Memory-map the tar of a shard."""
        shard = self.manifest.shards[shard_idx]
        shown = self.files.shown(shard)
        with self.files.open(shard) as file:
            try:
                tar = map_file(file)
            except OSError as error:
                raise StorageError(f"{shown} cannot be mapped: {error}. Is its disk still mounted?") from error
        if len(tar) != shard.bytes:
            raise StorageError(
                f"{shown} has {len(tar)} bytes, but had {shard.bytes} before. Was it rebuilt, or is it being copied? "
                "Start again when that is done."
            )
        return tar
