"""Where the files of a set of shards are: in a local folder, elsewhere, or behind a URL and its cache.

Manifest and indexes are always in a local folder: the set's own, or the place in the cache that those of a URL were
fetched to. Tars are opened when they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

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
from arc_ds.shards.storage.cache import ShardCache, open_cache
from arc_ds.shards.storage.remote import TransferError, fetch_bytes
from arc_ds.system.files import write_whole
from arc_ds.system.urls import is_url, join_url, local_path, shown_url

_THREADS = 16  # for waits, not for work: small files behind a network
_MAX_MANIFEST_BYTES = 1 << 30
_T = TypeVar("_T")


class SideFile(NamedTuple):
    """A file that is kept in a folder beside shards."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """The files of one set of shards.

    name: path or URL as messages show it. folder: of manifest and indexes. base: URL of the folder of tars, None
    where it is `folder`. cache: of what is fetched, None where nothing is. beside: folders beside the tars behind a
    URL that this process reads as well, with their files for each shard, by its name.
    """

    name: str
    folder: Path
    manifest: Manifest
    base: str | None
    cache: ShardCache | None
    beside: dict[str, Mapping[str, Sequence[SideFile]]] = field(default_factory=dict, compare=False)

    def address(self, shard: ShardInfo) -> str:
        """Path or URL of a shard's tar."""
        if shard.location is not None:
            return shard.location if is_url(shard.location) else str(self.folder / local_path(shard.location))
        return join_url(self.base, shard.name) if self.base is not None else str(self.folder / shard.name)

    def shown(self, shard: ShardInfo) -> str:
        """The address as messages show it."""
        return shown_url(self.address(shard))

    def open(self, shard: ShardInfo) -> IO[bytes]:
        """A shard's tar, fetched where it is behind a URL. StorageError where it is gone or cannot be fetched."""
        address = self.address(shard)
        if is_url(address):
            assert self.cache is not None, "a set with tars behind URLs is opened with a cache"
            return self.cache.open(address, num_bytes=shard.bytes, sha256=shard.sha256)
        try:
            return open(address, "rb")
        except OSError as error:
            raise StorageError(
                f"{address} cannot be opened: {error.strerror or error}. Is its disk still mounted, and were the "
                "shards moved or built again meanwhile?"
            ) from error

    def bring(self, shard: ShardInfo) -> None:
        """Fetch what is read of a shard ahead of its use, unless another process is about it.

        StorageError where that fails.
        """
        address = self.address(shard)
        if self.cache is None or not is_url(address):
            return
        self.cache.bring(address, num_bytes=shard.bytes, sha256=shard.sha256)
        for folder, file in self._beside(shard):
            self.cache.bring(self._address_beside(folder, file), num_bytes=file.num_bytes, sha256=file.sha256)

    def num_bytes(self, shard: ShardInfo) -> int:
        """How much is read of a shard: its tar, and what lies beside it."""
        return shard.bytes + sum(file.num_bytes for _, file in self._beside(shard))

    def fetch_beside(self, name: str, *, max_bytes: int) -> bytes | None:
        """A small file that may lie with the tars behind a URL, by its path from their folder; None where it does not.

        A `pipe:` command does not say why it failed. It is run once, and a failure or empty output means that there is
        no such file. StorageError if a server does not say that it has no such file.
        """
        assert self.base is not None and self.cache is not None, "what is local is not fetched"
        address, retries = join_url(self.base, name), self.cache.retries
        tells_why = not address.startswith("pipe:")
        try:
            found = fetch_bytes(
                address, max_bytes=max_bytes, retries=retries if tells_why else replace(retries, attempts=1)
            )
            return found or None
        except StorageError as error:
            reason = error.__cause__
            if not tells_why or (isinstance(reason, TransferError) and reason.is_absent):
                return None
            raise

    def open_beside(self, folder: str, file: SideFile) -> IO[bytes]:
        """A file of a folder beside the tars behind a URL, fetched into their cache; StorageError as `open`."""
        assert self.cache is not None, "what is local is not fetched"
        return self.cache.open(self._address_beside(folder, file), num_bytes=file.num_bytes, sha256=file.sha256)

    def kept_path(self, file: SideFile) -> Path:
        """Where a file that was fetched is kept."""
        assert self.cache is not None, "what is local is not fetched"
        return self.cache.tar_path(file.sha256)

    def _beside(self, shard: ShardInfo) -> list[tuple[str, SideFile]]:
        """Files of a shard, with their folders. Folders may be added by another thread meanwhile."""
        return [(folder, file) for folder, files in list(self.beside.items()) for file in files.get(shard.name, ())]

    def _address_beside(self, folder: str, file: SideFile) -> str:
        assert self.base is not None, "what is local is not fetched"
        return join_url(self.base, f"{folder}/{file.name}")

    def cure(self, shard: ShardInfo) -> str:
        """What to do about a tar whose bytes are not what they were."""
        if self.cache is not None and is_url(self.address(shard)):
            return f"Delete {self.cache.tar_path(shard.sha256)}, so that it is fetched again."
        return REBUILD

    def check(self) -> None:
        """DataError where an index or a tar of a local folder is missing or not the manifest's.

        What was fetched was checked then.
        """
        for_each(self._check_shard, self.manifest.shards)

    def _check_shard(self, shard: ShardInfo) -> None:
        address = self.address(shard)
        if not is_url(address):
            check_size(Path(address), shard)
        if self.base is None:
            read_index(self.folder, shard)


def locate(path: str | Path, cache: ShardCache | None = None) -> ShardFiles:
    """The files of the set of shards at a path or URL. Manifest and indexes of a URL are fetched; nothing is checked.

    DataError where there is no manifest that can be used, StorageError where it cannot be reached, ConfigError where
    the cache is smaller than a shard.
    """
    base = str(path) if is_url(path) else None
    if base is None:
        folder = local_path(path)
        manifest = read_manifest(folder)
    else:
        cache = cache or open_cache()
        folder, manifest = _fetch_set(base, cache)
    places = [shard.location for shard in manifest.shards if shard.location is not None]
    _check_places(shown_url(path), places, is_fetched=base is not None)
    if base is None:
        cache = (cache or open_cache()) if any(map(is_url, places)) else None
    files = ShardFiles(name=shown_url(path), folder=folder, manifest=manifest, base=base, cache=cache)
    if cache is not None:
        _check_bound(files, cache)
    return files


def _check_places(name: str, places: Sequence[str], *, is_fetched: bool) -> None:
    """A manifest comes with the data, from whoever made them: it names no commands, and from afar no local files."""
    for place in places:
        if place.startswith("pipe:") or (is_fetched and not is_url(place)):
            raise DataError(
                f"{name}: its manifest says that a tar is at {place}. Commands in a manifest, and local paths in one "
                "that was fetched, are not followed. Put the tars beside the manifest, or behind http(s), s3 or gs."
            )


def _check_bound(files: ShardFiles, cache: ShardCache) -> None:
    for shard in files.manifest.shards:
        if shard.bytes > cache.max_bytes and is_url(files.address(shard)):
            raise ConfigError(
                f"data.cache_gib: the cache {cache.folder} may take {cache.max_bytes} bytes, but {shard.name} of "
                f"{files.name} has {shard.bytes}. Raise it, or set data.cache_dir to a folder of a larger disk."
            )


def _fetch_set(base: str, cache: ShardCache) -> tuple[Path, Manifest]:
    """Fetch the manifest, and the indexes that the cache does not have, to the cache's folder of this manifest."""
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
    most = 4096 + shard.samples * INDEX_DTYPE.itemsize
    raw = fetch_bytes(address, max_bytes=most, retries=cache.retries, sha256=shard.index_sha256)
    parse_index(raw, shard, shown_url(address))
    write_whole(path, raw)


def for_each(function: Callable[[_T], None], items: Sequence[_T]) -> None:
    """Apply a function that waits for files, several at a time; the first error ends it."""
    if len(items) < _THREADS:
        for item in items:
            function(item)
        return
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for future in [pool.submit(function, item) for item in items]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def check_size(path: Path, shard: ShardInfo) -> None:
    """DataError where a local tar is missing or has another size than the manifest says."""
    if not path.is_file():
        raise DataError(f"{path}: the manifest names this shard, but it is missing. {REBUILD}")
    size = path.stat().st_size
    if size != shard.bytes:
        state = "cut short" if size < shard.bytes else "longer than written"
        raise DataError(f"{path}: expected {shard.bytes} bytes, got {size}: {state}. {REBUILD}")
