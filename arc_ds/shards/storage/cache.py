"""A bounded cache folder of fetched shards, shared by all processes of a host.

A file is named by its sha256, so it is never stale. Advisory locks (flock) coordinate the processes:

- `locks/XX` (first two digits of the sha256): held while a file is fetched, so that each file is fetched once.
- `locks/room`: held while space is freed and reserved, so that concurrent fetches stay within the bound.
- the file itself: readers (also through a memory map) hold a shared lock, the writer an exclusive one. A locked file is
  in use and is not evicted.

The system releases a process's locks when it ends. A killed process therefore leaves only a partial file, which is
overwritten or evicted like any other.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from arc_ds.errors import StorageError
from arc_ds.shards.storage.remote import Retries, download
from arc_ds.system.files import file_size, is_disk_full
from arc_ds.system.urls import shown_url
from arc_ds.system.user_paths import user_path

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_TARS = "tars"
_GIB = 1 << 30


class KnownFile(NamedTuple):
    """A file whose content is known in advance.

    address: its URL, or its path.
    """

    address: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCache:
    """The cache folder of fetched shards.

    folder: root of the cache.
    max_bytes: limit on the size of tars and token cache files. Indexes and manifests (about 1%) are not counted.
    retries: how often and for how long a fetch is retried.
    """

    folder: Path
    max_bytes: int
    retries: Retries = field(default_factory=Retries)

    def open(self, file: KnownFile) -> IO[bytes]:
        """Open a file at a URL for reading, and fetch it first if the cache does not hold it.

        The file is not evicted while it or a mapping of it is open in any process. Raises StorageError if it cannot be
        fetched or stored.
        """
        try:
            if (cached := self._open_cached(file)) is not None:
                return cached
            with self.lock(file.sha256[:2]):
                return self._open_cached(file) or self._fetch(file)
        except OSError as error:
            raise self.storage_error(file.address, error) from error

    def prefetch(self, file: KnownFile) -> None:
        """Fetch a file at a URL unless it is cached or being fetched elsewhere. Errors as in `open`."""
        path = self.path(file)
        try:
            with self.lock(file.sha256[:2], wait=False) as is_held:
                if is_held and file_size(path) != file.num_bytes:
                    self._fetch(file).close()
        except OSError as error:
            raise self.storage_error(file.address, error) from error

    def path(self, file: KnownFile) -> Path:
        """Path of a file (a tar or a token cache file) in the cache."""
        return self.folder / _TARS / file.sha256

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the named lock, which is shared by all processes and threads of the host. Yields whether it is held.

        wait: whether to wait for the lock. Otherwise yields False if another process or thread holds it.
        """
        path = self.folder / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a child forked meanwhile also holds the descriptor

    def storage_error(self, url: str, error: OSError) -> StorageError:
        """The error to raise if a fetched file cannot be stored."""
        cure = (
            "Free some of the disk, lower data.cache_gib, or set data.cache_dir to a folder of a larger disk."
            if is_disk_full(error)
            else "Set data.cache_dir to a folder of a local disk that this user may write to."
        )
        return StorageError(
            f"{shown_url(url)} cannot be kept in the cache {self.folder}: {error.strerror or error}. {cure}"
        )

    def _open_cached(self, wanted: KnownFile) -> IO[bytes] | None:
        path = self.path(wanted)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != wanted.num_bytes:
            logger.warning("%s does not have the expected size; fetching it again", path)
            file.close()
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(file.fileno())
        return file

    def _fetch(self, wanted: KnownFile) -> IO[bytes]:
        """Fetch a file and return it open, with a shared lock. The caller holds the lock of its name."""
        path = self.path(wanted)
        partial_path = path.with_name(path.name + _PARTIAL)
        file = self._reserve(partial_path, wanted.num_bytes)
        try:
            download(wanted.address, file, num_bytes=wanted.num_bytes, sha256=wanted.sha256, retries=self.retries)
            with self.lock("room"):
                partial_path.rename(path)
        except BaseException:
            partial_path.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)
            file.close()
            raise
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        return file

    def _reserve(self, path: Path, num_bytes: int) -> IO[bytes]:
        """Make room for `num_bytes`, and return a new open and locked file of that size."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock("room"):
            self._make_room(num_bytes)
            file = path.open("w+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.ftruncate(file.fileno(), num_bytes)
        return file

    def _make_room(self, num_bytes: int) -> None:
        """Evict the least recently used files that no process uses until `num_bytes` more fit within the bound."""
        found = _cached_files(self.folder)
        too_many = sum(stat.st_size for stat, _ in found) + num_bytes - self.max_bytes
        for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
            if too_many <= 0:
                return
            if _remove_unused(path):
                too_many -= stat.st_size
        if too_many > 0:
            _warn_of_bound(self.folder, self.max_bytes)


def open_cache(cache_dir: str | Path | None = None, cache_gib: float | None = None) -> ShardCache:
    """The cache for `data.cache_dir` and `data.cache_gib` of a config; None means the default. Creates no files."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "arc-ds" / "shards"
    given = cache_dir or os.environ.get("ARC_DS_CACHE_DIR") or default
    folder = Path(os.path.abspath(user_path(str(given))))
    if cache_gib is not None:
        return ShardCache(folder=folder, max_bytes=int(cache_gib * _GIB))
    cached = sum(stat.st_size for stat, _ in _cached_files(folder))
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return ShardCache(folder=folder, max_bytes=(shutil.disk_usage(nearest).free + cached) // 2)


def _cached_files(folder: Path) -> list[tuple[os.stat_result, str]]:
    """`stat` results and paths of the files in a cache. Skips a file that is deleted meanwhile."""
    found = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder / _TARS):
            with suppress(FileNotFoundError):
                found.append((entry.stat(), entry.path))
    return found


@cache
def _warn_of_bound(folder: Path, max_bytes: int) -> None:
    """Warn once per process, because every later fetch would repeat the message."""
    logger.warning(
        "%s: the shards in use exceed the cache limit of %.3g GiB and cannot be evicted until they are closed. "
        "Raise data.cache_gib.",
        folder, max_bytes / _GIB,
    )  # fmt: skip


def _remove_unused(path: str) -> bool:
    """Remove a file unless a process reads, maps or writes it. Returns whether the file no longer exists."""
    with suppress(FileNotFoundError), open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.unlink(path)
        fcntl.flock(file, fcntl.LOCK_UN)
    return True
