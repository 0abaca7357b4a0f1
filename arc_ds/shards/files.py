"""The location of the files of a set of shards: in a local folder, elsewhere, or at a URL, with a cache.

Manifest and indexes are always in a local folder: the set's own, or the folder in the cache that they were fetched to.
Tars are opened on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from arc_ds.errors import ConfigError, DataError, StorageError
from arc_ds.shards.format import (
    INDEX_DTYPE,
    MANIFEST,
    REBUILD,
    Manifest,
    ShardInfo,
    parse_index,
    parse_manifest,
    read_index,
    read_manifest,
    sha256_of_file,
)
from arc_ds.shards.storage.cache import KnownFile, ShardCache, open_cache
from arc_ds.shards.storage.remote import TransferError, fetch_bytes
from arc_ds.system.files import file_size, write_whole
from arc_ds.system.urls import is_url, join_url, local_path, shown_url
from arc_ds.system.user_files import check_downloaded

_THREADS = 16  # they wait for small files from the network
_MAX_MANIFEST_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """The files of one set of shards.

    name: path or URL, as shown in messages.
    folder: local folder of manifest and indexes.
    base: URL of the folder of tars; None if it is `folder`.
    cache: cache for the tars at URLs; None if all tars are local.
    beside: files of token caches that are fetched together with a tar, by cache name and shard name.
    """

    name: str
    folder: Path
    manifest: Manifest
    base: str | None
    cache: ShardCache | None
    beside: dict[str, Mapping[str, Sequence[KnownFile]]] = field(default_factory=dict, compare=False)

    def address(self, shard: ShardInfo) -> str:
        """Path or URL of a shard's tar."""
        if shard.location is not None:
            return shard.location if is_url(shard.location) else str(self.folder / local_path(shard.location))
        return join_url(self.base, shard.name) if self.base is not None else str(self.folder / shard.name)

    def shown(self, shard: ShardInfo) -> str:
        """The address as messages show it."""
        return shown_url(self.address(shard))

    def open(self, shard: ShardInfo) -> IO[bytes]:
        """Open a shard's tar, and fetch it first if it is at a URL.

        Raises StorageError if it is gone or cannot be fetched.
        """
        if self.is_fetched(shard):
            return self._required_cache().open(self._tar(shard))
        address = self.address(shard)
        try:
            return open(address, "rb")
        except OSError as error:
            raise StorageError(
                f"{address} cannot be opened: {error.strerror or error}. Is its disk still mounted, and were the "
                "shards moved or built again meanwhile?"
            ) from error

    def is_fetched(self, shard: ShardInfo) -> bool:
        """Whether the tar of a shard is at a URL."""
        return is_url(self.address(shard))

    def prefetch(self, shard: ShardInfo) -> None:
        """Fetch a shard's files ahead of their use, except files that another process is fetching.

        Raises StorageError if that fails.
        """
        if self.is_fetched(shard):
            for file in self._fetched_with(shard):
                self._required_cache().prefetch(file)

    def num_bytes(self, shard: ShardInfo) -> int:
        """Size of a shard's tar and of the token cache files that are fetched with it."""
        return sum(file.num_bytes for file in self._fetched_with(shard))

    def fetch_beside(self, name: str, *, max_bytes: int) -> bytes | None:
        """Fetch a small file that may be next to the tars at a URL; None if it does not exist.

        A `pipe:` command does not say why it failed. It is run once, and a failure or empty output means that there is
        no such file. Raises StorageError if a server does not say that it has no such file.

        name: path of the file from the folder of the tars.
        """
        address, retries = self.address_beside(name), self._required_cache().retries
        is_command = address.startswith("pipe:")
        if is_command:
            retries = replace(retries, attempts=1)
        try:
            return fetch_bytes(address, max_bytes=max_bytes, retries=retries) or None
        except StorageError as error:
            reason = error.__cause__
            if is_command or (isinstance(reason, TransferError) and reason.is_absent):
                return None
            raise

    def address_beside(self, name: str) -> str:
        """URL of a file next to the tars at a URL."""
        assert self.base is not None, "local files are not fetched"
        return join_url(self.base, name)

    def _required_cache(self) -> ShardCache:
        """The cache for the tars at URLs."""
        assert self.cache is not None, "a set with tars at URLs is opened with a cache"
        return self.cache

    def _tar(self, shard: ShardInfo) -> KnownFile:
        return KnownFile(self.address(shard), shard.bytes, shard.sha256)

    def _fetched_with(self, shard: ShardInfo) -> list[KnownFile]:
        """The tar of a shard and its token cache files. Another thread may add token caches meanwhile."""
        return [self._tar(shard), *(file for files in list(self.beside.values()) for file in files.get(shard.name, ()))]

    def cure(self, shard: ShardInfo) -> str:
        """The remedy for a tar with changed bytes."""
        if self.is_fetched(shard):
            return f"Delete {self._required_cache().path(self._tar(shard))}, so that it is fetched again."
        return REBUILD

    def check(self) -> None:
        """Raise DataError if a local index or tar is missing or does not match the manifest.

        Fetched files were checked when they were fetched.
        """
        for_each(self._check_shard, self.manifest.shards)

    def _check_shard(self, shard: ShardInfo) -> None:
        self.check_tar(shard)
        if self.base is None:
            read_index(self.folder, shard)

    def check_tar(self, shard: ShardInfo) -> None:
        """Raise DataError if the tar of a shard is local and missing, or does not have the manifest's size."""
        path = Path(self.address(shard))
        if self.is_fetched(shard):
            return
        size = file_size(path)
        if size is None:
            raise DataError(f"{path}: the manifest names this shard, but it is missing. {REBUILD}")
        if size != shard.bytes:
            check_downloaded(path, DataError)
            state = "cut short" if size < shard.bytes else "longer than written"
            raise DataError(f"{path}: expected {shard.bytes} bytes, got {size}: {state}. {REBUILD}")


def locate(path: str | Path, cache: ShardCache | None = None) -> ShardFiles:
    """The files of the set of shards at a path or URL. Fetches manifest and indexes of a URL; checks no files.

    Raises DataError if there is no usable manifest, StorageError if it cannot be reached, and ConfigError if the cache
    is smaller than a shard.
    """
    name, base = shown_url(path), None
    if is_url(path):
        base, cache = str(path), cache or open_cache()
        folder, manifest = _fetch_set(base, cache)
    else:
        folder = local_path(path)
        manifest = read_manifest(folder)
    places = [shard.location for shard in manifest.shards if shard.location is not None]
    for place in places:  # the manifest may come from anyone
        if place.startswith("pipe:") or (base is not None and not is_url(place)):
            raise DataError(
                f"{name}: its manifest says that a tar is at {place}. Commands in a manifest, and local paths in one "
                "that was fetched, are not followed. Put the tars next to the manifest, or at http(s), s3 or gs."
            )
    if base is None:
        cache = (cache or open_cache()) if any(map(is_url, places)) else None
    files = ShardFiles(name=name, folder=folder, manifest=manifest, base=base, cache=cache)
    for shard in manifest.shards:
        if cache is not None and shard.bytes > cache.max_bytes and files.is_fetched(shard):
            raise ConfigError(
                f"data.cache_gib: the cache {cache.folder} may take {cache.max_bytes} bytes, but {shard.name} of "
                f"{name} has {shard.bytes}. Raise it, or set data.cache_dir to a folder of a larger disk."
            )
    return files


def _fetch_set(base: str, cache: ShardCache) -> tuple[Path, Manifest]:
    """Fetch a manifest, and the indexes that the cache lacks, to the cache's folder of this manifest."""
    address = join_url(base, MANIFEST)
    raw = fetch_bytes(address, max_bytes=_MAX_MANIFEST_BYTES, retries=cache.retries)
    manifest = parse_manifest(raw, shown_url(address))
    folder = cache.folder / "sets" / manifest.fingerprint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with cache.lock(f"sets-{manifest.fingerprint[:2]}"):
            for_each(lambda shard: _fetch_index(base, folder, shard, cache), manifest.shards)
            write_whole(folder / MANIFEST, raw)
    except OSError as error:
        raise cache.storage_error(base, error) from error
    return folder, manifest


def _fetch_index(base: str, folder: Path, shard: ShardInfo, cache: ShardCache) -> None:
    path = folder / shard.index_name
    if path.is_file() and sha256_of_file(path) == shard.index_sha256:
        return
    address = join_url(base, shard.index_name)
    max_bytes = 4096 + shard.samples * INDEX_DTYPE.itemsize
    raw = fetch_bytes(address, max_bytes=max_bytes, retries=cache.retries, sha256=shard.index_sha256)
    parse_index(raw, shard, shown_url(address))
    write_whole(path, raw)


def for_each(function: Callable[[ShardInfo], None], shards: Sequence[ShardInfo]) -> None:
    """Call a function that waits for files, for several shards at a time if there are many. The first error ends it."""
    with ThreadPoolExecutor(_THREADS if len(shards) >= _THREADS else 1) as pool:
        for _ in pool.map(function, shards):
            pass
