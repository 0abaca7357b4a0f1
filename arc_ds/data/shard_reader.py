"""Reading shards through their indexes by mmap, and checking them."""

from __future__ import annotations

import bisect
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from arc_ds.data.records import decode_record
from arc_ds.data.shards import INDEX_DTYPE, MANIFEST, REBUILD, ShardInfo, read_index, read_manifest, sha256_of_file
from arc_ds.errors import DataError


class ShardSet:
    """A folder of shards, its records in one numbering from 0.

    Opening checks the manifest, every index and every size, and reads no record. Tars are mapped when first needed, in
    each process for itself: the object may cross a fork or be pickled.
    """

    def __init__(self, folder: str | Path) -> None:
        """DataError where the folder is no whole set of shards: missing or cut files, or another index."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.fingerprint = self.manifest.fingerprint
        indexes = []
        for shard in self.manifest.shards:
            _check_size(self.folder / shard.name, shard)
            indexes.append(read_index(self.folder, shard))
        index = np.concatenate(indexes)
        self.num_tokens: NDArray[np.int32] = np.ascontiguousarray(index["tokens"])
        self._offsets = np.ascontiguousarray(index["offset"])
        self._lengths = np.ascontiguousarray(index["length"])
        self._checksums = np.ascontiguousarray(index["xxh64"])
        self.shard_sizes = np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)
        self._first = (np.cumsum(self.shard_sizes) - self.shard_sizes).tolist()
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def tokens(self, idx: int) -> int:
        """Tokens of one record, by the tokenizer that the shards were built with; `num_tokens` has all, int32."""
        return int(self.num_tokens[idx])

    def record(self, idx: int) -> dict[str, Any]:
        """Record `idx`, its checksum verified; DataError naming shard, member and offset where it is damaged."""
        if not 0 <= idx < len(self):
            raise DataError(f"{self.folder}: record {idx} was asked for; it holds 0 to {len(self) - 1}.")
        shard_idx = bisect.bisect_right(self._first, idx) - 1
        offset, length = int(self._offsets[idx]), int(self._lengths[idx])
        payload = self._map(shard_idx)[offset : offset + length]
        try:
            if len(payload) != length or xxhash.xxh64_intdigest(payload) != int(self._checksums[idx]):
                raise DataError("the checksum is not the index's")
            return decode_record(payload)
        except DataError as error:
            place = f"{self.folder / self.manifest.shards[shard_idx].name}, member {idx:09d}.json at byte {offset}"
            raise DataError(f"{place}: {error}. {REBUILD} Or set data.on_error: skip.") from error

    def _map(self, shard_idx: int) -> mmap.mmap:
        """The mapped tar of a shard. A mapping made before a fork stays valid in the child: it is only read."""
        found = self._maps.get(shard_idx)
        if found is None:
            path = self.folder / self.manifest.shards[shard_idx].name
            try:
                with path.open("rb") as file:
                    found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # an empty file cannot be mapped
                raise DataError(f"{path} cannot be opened: {error}. Is its disk still mounted?") from error
            self._maps[shard_idx] = found
        return found


def _check_size(path: Path, shard: ShardInfo) -> None:
    if not path.is_file():
        raise DataError(f"{path}: the manifest names this shard, but it is missing. {REBUILD}")
    size = path.stat().st_size
    if size != shard.bytes:
        state = "cut short" if size < shard.bytes else "longer than written"
        raise DataError(f"{path}: expected {shard.bytes} bytes, got {size}: {state}. {REBUILD}")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a file of a folder of shards; `offset` in bytes, None where it concerns the whole file."""

    file: str
    offset: int | None
    what: str

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        return f"{self.file}{place}: {self.what}"


def check_shards(folder: str | Path) -> list[Fault]:
    """Read everything in a folder of shards and return every fault, none where all is well.

    Verified: the manifest, files missing or unknown, sizes, sha256 of tars and indexes, that tar headers and index
    agree, and checksum and content of every record. DataError only where there is no readable manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    known = {MANIFEST, *(s.name for s in manifest.shards), *(s.index_name for s in manifest.shards)}
    faults = [Fault(p.name, None, "not in the manifest") for p in sorted(folder.iterdir()) if p.name not in known]
    for shard in manifest.shards:
        faults += _check_shard(folder, shard)
    return faults


def _check_shard(folder: Path, shard: ShardInfo) -> list[Fault]:
    faults = []
    path = folder / shard.name
    try:
        _check_size(path, shard)
        if sha256_of_file(path) != shard.sha256:
            faults.append(Fault(shard.name, None, "its sha256 is not the manifest's"))
    except DataError as error:
        faults.append(Fault(shard.name, None, str(error)))
    try:
        index = read_index(folder, shard)
    except DataError as error:
        return [*faults, Fault(shard.index_name, None, str(error))]
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            faults += [fault for row in index if (fault := _check_member(data, shard.name, row))]
    return faults


def _check_member(data: mmap.mmap, name: str, row: np.void) -> Fault | None:
    """What is wrong with one member: its tar header, its checksum or its record."""
    assert row.dtype == INDEX_DTYPE, "index rows are checked when they are read"
    offset, length = int(row["offset"]), int(row["length"])
    if offset + length > len(data):
        return Fault(name, offset, f"a member of {length} bytes lies beyond the end of the file")
    header = data[offset - 512 : offset]
    size = header[124:135].strip(b" \0")
    if header[257:262] != b"ustar" or not size.isdigit() or int(size, 8) != length:
        return Fault(name, offset - 512, "the tar header does not agree with the index")
    payload = data[offset : offset + length]
    if xxhash.xxh64_intdigest(payload) != int(row["xxh64"]):
        return Fault(name, offset, "the member's checksum is not the index's")
    try:
        decode_record(payload)
    except DataError as error:
        return Fault(name, offset, str(error))
    return None
