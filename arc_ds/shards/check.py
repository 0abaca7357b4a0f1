"""Checking sets of shards in several processes: reads everything and reports every fault."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.files import ShardFiles, locate
from arc_ds.shards.format import INDEX_DTYPE, MANIFEST, Manifest, ShardInfo, read_index
from arc_ds.shards.members import BLOCK, decode_member, parse_header
from arc_ds.shards.parallel import map_in_order
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.token_cache.files import PREFIX, ids_name, read_cache_index
from arc_ds.shards.token_cache.writer import fault_of, stray_files
from arc_ds.system.files import file_size
from arc_ds.system.locks import LOCK_FILE
from arc_ds.system.urls import is_url


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


def check_shards(
    path: str | Path, *, cache: ShardCache | None = None, workers: int = 1, progress: bool = False
) -> Iterator[Fault]:
    """Read a whole set of shards, in a local folder or at a URL, and yield every fault.

    Verifies the manifest, missing and unknown files, sizes, sha256 of tars and indexes, agreement of tar headers with
    the index, and the checksum and content of every record. The faults of the token caches next to the shards come
    last. The order does not depend on the number of workers.

    Raises DataError only if there is no readable manifest, and StorageError if the manifest or the indexes of a URL
    cannot be fetched.
    """
    files = locate(path, cache)
    if not is_url(path):
        yield from _stray_files(files)
    shards = files.manifest.shards
    with tqdm(total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, disable=not progress) as bar:
        for shard, faults in map_in_order(partial(_check_shard, files), shards, workers):
            yield from faults
            bar.update(shard.bytes)
    yield from check_token_caches(files.folder, files.manifest)


def _stray_files(files: ShardFiles) -> list[Fault]:
    """Files in a local folder that do not belong to its set. Subfolders are ignored: token caches live there."""
    shards = files.manifest.shards
    known = {MANIFEST, LOCK_FILE, *(s.name for s in shards), *(s.index_name for s in shards)}
    strays = sorted(p.name for p in files.folder.glob("*") if p.name not in known and not p.is_dir())
    return [Fault(name, None, "not in the manifest") for name in strays]


def _check_shard(files: ShardFiles, shard: ShardInfo) -> list[Fault]:
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
    if files.is_fetched(shard) or file_size(tar):
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


def check_token_caches(folder: Path, manifest: Manifest) -> list[Fault]:
    """Find every fault of the caches in a folder of manifest and indexes.

    Verifies that each cache is complete and belongs to these shards, and the sha256 of all its files. No cache is no
    fault.
    """
    faults = []
    for cache in sorted(folder.glob(f"{PREFIX}*")):
        try:
            index = read_cache_index(cache)
        except DataError as error:
            faults.append(Fault(cache.name, None, f"{error}. Remove the cache or run arc-ds shards tokenize again."))
            continue
        strays = stray_files(cache, index.shards)
        faults += [Fault(f"{cache.name}/{path.name}", None, "not in its index") for path in strays]
        for shard in manifest.shards:
            if (what := fault_of(cache, index, manifest, shard)) is not None:
                what += ". Run arc-ds shards tokenize again."
                faults.append(Fault(f"{cache.name}/{ids_name(shard.name)}", None, what))
        gone = index.shards.keys() - {shard.name for shard in manifest.shards}
        faults += [Fault(f"{cache.name}/{ids_name(name)}", None, "its shard no longer exists") for name in sorted(gone)]
    return faults
