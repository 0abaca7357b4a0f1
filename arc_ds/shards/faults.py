"""The faults of a set of shards: of its folder, and of each tar and index."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.files import ShardFiles
from arc_ds.shards.format import INDEX_DTYPE, MANIFEST, Manifest, ShardInfo, read_index
from arc_ds.shards.members import BLOCK, decode_member, parse_header


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in one file of a folder of shards.

    file: name of the file.
    offset: position of the fault in bytes, None if it concerns the whole file.
    what: description of the fault.
    """

    file: str
    offset: int | None
    what: str

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        return f"{self.file}{place}: {self.what}"


def stray_files(files: ShardFiles) -> list[Fault]:
    """Files in a local folder that do not belong to its set. Subfolders are ignored: token caches live there."""
    shards = files.manifest.shards
    known = {MANIFEST, *(s.name for s in shards), *(s.index_name for s in shards)}
    strays = sorted(p.name for p in files.folder.iterdir() if p.name not in known and not p.is_dir())
    return [Fault(name, None, "not in the manifest") for name in strays]


def check_shard(files: ShardFiles, shard: ShardInfo) -> list[Fault]:
    """The faults of one shard: those of its tar and of its index."""
    faults = []
    try:
        files.check_tar(shard)
    except DataError as error:
        faults.append(Fault(shard.name, None, str(error)))
    try:
        index = read_index(files.folder, shard)
    except DataError as error:
        faults.append(Fault(shard.index_name, None, str(error)))
        index = np.empty(0, dtype=INDEX_DTYPE)
    tar = Path(files.address(shard))
    if files.is_fetched(shard) or (tar.is_file() and tar.stat().st_size):
        faults += _check_tar(files, shard, index)
    return faults


def _check_tar(files: ShardFiles, shard: ShardInfo, index: NDArray[np.void]) -> list[Fault]:
    """The faults of a non-empty tar: its sha256, and every member that the index lists."""
    try:
        with files.open(shard) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            faults = []
            if len(data) == shard.bytes and hashlib.sha256(data).hexdigest() != shard.sha256:
                faults.append(Fault(shard.name, None, "its sha256 does not match the manifest"))
            return faults + [fault for row in index if (fault := _check_member(data, files.manifest, shard, row))]
    except StorageError as error:
        return [Fault(shard.name, None, str(error))]


def _check_member(data: mmap.mmap, manifest: Manifest, shard: ShardInfo, row: np.void) -> Fault | None:
    """The fault of one member (tar header, checksum or record), None if it is sound."""
    offset, length = int(row["offset"]), int(row["length"])
    if not BLOCK <= offset <= offset + length <= len(data):
        return Fault(shard.name, offset, f"a member of {length} bytes lies beyond the file")
    header = parse_header(data[offset - BLOCK : offset])
    if header is None or header.size != length:
        return Fault(shard.name, offset - BLOCK, "the tar header does not agree with the index")
    payload = data[offset : offset + length]
    if xxhash.xxh64_intdigest(payload) != int(row["xxh64"]):
        return Fault(shard.name, offset, "the member's checksum does not match the index")
    try:
        decode_member(payload, member=shard.member, text_field=manifest.text_field, kind=manifest.kind)
    except DataError as error:
        return Fault(shard.name, offset, str(error))
    return None
