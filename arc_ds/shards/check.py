"""Checking sets of shards in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from arc_ds.shards.faults import Fault, check_shard, stray_files
from arc_ds.shards.files import locate
from arc_ds.shards.parallel import map_in_order
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.token_cache.writer import check_token_caches
from arc_ds.system.urls import is_url


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
        yield from stray_files(files)
    shards = files.manifest.shards
    with tqdm(total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, disable=not progress) as bar:
        for shard, faults in map_in_order(partial(check_shard, files), shards, workers):
            yield from faults
            bar.update(shard.bytes)
    yield from check_token_caches(files.folder, files.manifest)
