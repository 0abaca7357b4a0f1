"""Checking sets of shards in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from arc_ds.shards.faults import Fault, check_shard, stray_files
from arc_ds.shards.files import ShardFiles, locate
from arc_ds.shards.token_cache.writer import check_token_caches
from arc_ds.system.processes import worker_pool
from arc_ds.system.urls import is_url


def check_in_parallel(path: str | Path, *, workers: int, progress: bool = False) -> Iterator[Fault]:
    """Yield the faults that `check_shards` finds, in the same order, with shards distributed over `workers` processes.

    The faults of the token caches next to the shards come last.
    """
    files = locate(path)
    if not is_url(path):
        yield from stray_files(files)
    shards = files.manifest.shards
    with tqdm(total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, disable=not progress) as bar:
        for idx, faults in enumerate(_faults_by_shard(files, min(workers, len(shards)))):
            yield from faults
            bar.update(shards[idx].bytes)
    yield from check_token_caches(files.folder, files.manifest)


def _faults_by_shard(files: ShardFiles, workers: int) -> Iterator[list[Fault]]:
    shards = files.manifest.shards
    if workers <= 1:
        yield from (check_shard(files, shard) for shard in shards)
        return
    with worker_pool(workers, _begin, files) as pool:
        yield from pool.map(_check, range(len(shards)))


_files: ShardFiles | None = None  # set in each worker process


def _begin(files: ShardFiles) -> None:
    global _files
    _files = files


def _check(shard_idx: int) -> list[Fault]:
    assert _files is not None, "the initializer runs before the first task"
    return check_shard(_files, _files.manifest.shards[shard_idx])
