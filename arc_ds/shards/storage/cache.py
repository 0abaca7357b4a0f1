"""A bounded folder of fetched shards that all processes of a host share.

A file is named by its sha256, so it is never stale. Advisory locks (flock) order the processes:

- `locks/XX` (the sum's first two digits): held while a file is fetched, so that each is fetched once.
- `locks/room`: held while room is made and reserved, so that the bound holds whatever is fetched at once.
- the file itself: shared by who reads or maps it, exclusive by who writes it. What is locked is in use, and stays.

Locks end with the process that holds them, so a killed one leaves nothing but a partial file, which is used up or
removed like any other.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import IO

from arc_ds.errors import StorageError
from arc_ds.shards.storage.remote import Retries, download, with_retries
from arc_ds.system.urls import shown_url

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCache:
    """Where fetched shards are kept. max_bytes: of tars and of the files of their token caches; indexes and manifests
    (about a hundredth) come on top."""

    folder: Path
    max_bytes: int
    retries: Retries = field(default_factory=Retries)

    def open(self, url: str, *, num_bytes: int, sha256: str) -> IO[bytes]:
        """The file with this sum, open for reading; fetched where it is not here.

        It stays while the file or a mapping of it is open, in any process. StorageError where it cannot be fetched or
        kept.
        """
        path = self.tar_path(sha256)
        try:
            found = self._open_kept(path, num_bytes)
            if found is not None:
                return found
            with self.lock(sha256[:2]):
                return self._open_kept(path, num_bytes) or self._fetch(url, path, num_bytes, sha256)
        except OSError as error:
            raise self.storage_error(url, error) from error

    def bring(self, url: str, *, num_bytes: int, sha256: str) -> None:
        """Fetch the file with this sum, unless it is here or another process is about it. StorageError as `open`."""
        path = self.tar_path(sha256)
        try:
            with self.lock(sha256[:2], wait=False) as is_held:
                if is_held and not (path.is_file() and path.stat().st_size == num_bytes):
                    self._fetch(url, path, num_bytes, sha256).close()
        except OSError as error:
            raise self.storage_error(url, error) from error

    def tar_path(self, sha256: str) -> Path:
        """Where the file with this sum, a tar or one of a token cache, is kept."""
        return self.folder / "tars" / sha256

    @contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a name among all processes and threads of the host, and give whether it is held.

        Without `wait` it is not, where another holds it.
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
                fcntl.flock(file, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too

    def storage_error(self, url: str, error: OSError) -> StorageError:
        """What to raise where a fetched file cannot be kept."""
        cure = (
            "Free some of the disk, lower data.cache_gib, or set data.cache_dir to a folder of a larger disk."
            if is_disk_full(error)
            else "Set data.cache_dir to a folder of a local disk that this user may write to."
        )
        return StorageError(
            f"{shown_url(url)} cannot be kept in the cache {self.folder}: {error.strerror or error}. {cure}"
        )

    def _open_kept(self, path: Path, num_bytes: int) -> IO[bytes] | None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != num_bytes:
            logger.warning("%s has another size than written: it is fetched again", path)
            file.close()
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(file.fileno())
        return file

    def _fetch(self, url: str, path: Path, num_bytes: int, sha256: str) -> IO[bytes]:
        """Fetch a file, its name's lock being held, and return it open and in use."""
        partial_path = path.with_name(path.name + _PARTIAL)
        file = self._reserve(partial_path, num_bytes)
        with ExitStack() as undo:
            undo.callback(file.close)
            undo.callback(fcntl.flock, file, fcntl.LOCK_UN)
            undo.callback(partial_path.unlink, missing_ok=True)
            transfer = partial(
                download, url, file, num_bytes=num_bytes, sha256=sha256, timeout_s=self.retries.timeout_s
            )
            with_retries(url, transfer, self.retries)
            with self.lock("room"):
                partial_path.rename(path)
            undo.pop_all()
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        return file

    def _reserve(self, path: Path, num_bytes: int) -> IO[bytes]:
        """A new file that counts as `num_bytes`, open and locked, after room for it was made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock("room"):
            self._make_room(num_bytes)
            file = path.open("w+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.ftruncate(file.fileno(), num_bytes)
        return file

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used files that no process uses, until `num_bytes` more are within the bound."""
        found = _files(path_of_tars(self.folder))
        too_many = sum(stat.st_size for stat, _ in found) + num_bytes - self.max_bytes
        for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
            if too_many <= 0:
                return
            if _remove_unused(path):
                too_many -= stat.st_size
        if too_many > 0:
            _warn_of_bound(self.folder, self.max_bytes)


def open_cache(cache_dir: str | Path | None = None, cache_gib: float | None = None) -> ShardCache:
    """The cache of a config's `data.cache_dir` and `data.cache_gib`, None being their defaults. Nothing is made yet."""
    folder = Path(os.path.abspath(os.path.expanduser(cache_dir or _default_folder())))
    max_bytes = _half_of_the_free(folder) if cache_gib is None else int(cache_gib * _GIB)
    return ShardCache(folder=folder, max_bytes=max_bytes)


def is_disk_full(error: OSError) -> bool:
    """Whether a file could not be written because there is no room for it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path_of_tars(folder: Path) -> Path:
    """Where a cache keeps tars."""
    return folder / "tars"


def _default_folder() -> Path:
    if named := os.environ.get("ARC_DS_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "arc-ds" / "shards"


def _half_of_the_free(folder: Path) -> int:
    tars = path_of_tars(folder)
    kept = sum(stat.st_size for stat, _ in _files(tars)) if os.path.isdir(tars) else 0
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return (shutil.disk_usage(nearest).free + kept) // 2


def _files(folder: Path) -> list[tuple[os.stat_result, str]]:
    """Sizes, times and paths of the files of a folder; one that vanishes meanwhile is left out."""
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            found.append((entry.stat(), entry.path))
    return found


@cache
def _warn_of_bound(folder: Path, max_bytes: int) -> None:
    """Once a process: each further fetch would say the same."""
    logger.warning(
        "%s: the shards in use at once take more than the cache's bound of %.3g GiB, and stay while they are. "
        "Raise data.cache_gib.",
        folder, max_bytes / _GIB,
    )  # fmt: skip


def _remove_unused(path: str) -> bool:
    """Whether a file is gone: it is not removed where a process reads, maps or writes it."""
    with suppress(FileNotFoundError), open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.unlink(path)
        fcntl.flock(file, fcntl.LOCK_UN)
    return True
