"""Memory maps of shard files, closed in least-recently-used order.

A memory map holds a file descriptor, and a mapped file of a fetched shard cannot be evicted from the cache on disk. A
process therefore maps at most

- half as many files as it may open, and never more than 4096: the page tables of a fully read shard take 1/512 of its
  size in each process;
- a quarter of `data.cache_gib` of fetched files, or one shard per source if that is more.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from operator import attrgetter
from typing import IO, Any, Generic, TypeVar
from weakref import WeakSet

from arc_ds.errors import ArcError, StorageError
from arc_ds.shards.storage.cache import ShardCache

logger = logging.getLogger(__name__)

_MAX_MAPPED = 4096
_MAX_LIMIT = 65536  # more does not help, and a child that closes every possible descriptor would take minutes
_T = TypeVar("_T")

_clock = itertools.count()
_sources: WeakSet[MappedFiles[Any]] = WeakSet()  # of this process; a fork copies them and their maps


class MappedFiles(Generic[_T]):
    """The files of one source by shard number, each mapped on first use.

    A caller that still holds a mapping, or a view of it, may keep reading it after it was closed here. Threads need no
    lock: at worst, two of them map the same file twice. Deleting this object releases its mappings.
    """

    def __init__(self, *, num_files: int = 1, num_bytes: int = 0, cache: ShardCache | None = None) -> None:
        """
        num_files: number of files per shard.
        num_bytes: total size of the files of the largest shard.
        cache: cache that the files are fetched into, None if they are local.
        """
        self.num_files = num_files
        self.fetched_bytes = num_bytes if cache is not None else 0
        self.entries: dict[int, list[Any]] = {}  # by shard: [time of last use, mapping]
        self._max_bytes = cache.max_bytes // 4 if cache is not None else 0
        _sources.add(self)

    def get(self, shard_idx: int, open_files: Callable[[int], _T]) -> _T:
        """The mapping of a shard; `open_files` makes it if there is none."""
        entry = self.entries.get(shard_idx)
        if entry is None:
            max_files = min(_descriptor_limit() // 2, _MAX_MAPPED)
            _make_room(self, attrgetter("num_files"), max_files, spare=max_files // 8)
            _make_room(self, attrgetter("fetched_bytes"), self._max_bytes, num_kept=1)
            entry = self.entries[shard_idx] = [0, with_descriptors(lambda: open_files(shard_idx))]
        entry[0] = next(_clock)
        mapping: _T = entry[1]
        return mapping


def _make_room(
    wanting: MappedFiles[Any], size: Callable[[MappedFiles[Any]], int], bound: int, *, spare: int = 0, num_kept: int = 0
) -> None:
    """Close the least recently used mappings until the process stays within `bound` with one more of `wanting`.

    wanting: source that is about to map a file.
    size: returns the size of one mapping of a source.
    bound: limit on the sum of these sizes.
    spare: extra room to free once any is freed, because sorting thousands of mappings takes longer than mapping a file.
    num_kept: number of mappings that every other source keeps.
    """
    sources = [source for source in list(_sources) if size(source)]
    excess = size(wanting) + sum(len(source.entries) * size(source) for source in sources) - bound
    if excess <= 0 or not size(wanting):
        return
    used = [(entry[0], idx, source) for source in sources for idx, entry in source.entries.copy().items()]
    for _, idx, source in sorted(used, key=lambda item: item[0]):
        if excess <= -spare:
            return
        if (source is wanting or len(source.entries) > num_kept) and source.entries.pop(idx, []):
            excess -= size(source)


def close_all() -> bool:
    """Close every mapping of this process. Returns whether there was any."""
    sources = [source for source in list(_sources) if source.entries]
    for source in sources:
        source.entries.clear()
    return bool(sources)


def _descriptor_limit() -> int:
    """The number of files that this process may have open (often only 1024)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_LIMIT if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """Raise the descriptor limit of this process and its children to the hard limit, at most 65536.

    If the system forbids that, the limit stays unchanged.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
    if _descriptor_limit() < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def with_descriptors(open_files: Callable[[], _T]) -> _T:
    """Call a function that opens files. If no descriptor is left, close all mappings and call it again.

    Raises StorageError, with the remedy, if no descriptor is left although nothing is mapped.
    """
    while True:
        try:
            return open_files()
        except (ArcError, OSError) as error:
            shortage = descriptor_shortage(error)
            if shortage is None:
                raise
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if not close_all():
                raise StorageError(
                    f"{shortage.filename or 'A shard'} cannot be opened: this process has reached its limit of {soft} "
                    f"open files, and none of them is a shard. Raise the limit (for example ulimit -n "
                    f"{max(4 * soft, 4096)}; up to {hard} without administrator rights) and start again: a run resumes "
                    "where it stopped."
                ) from error
            _warn_of_shortage(soft)


def descriptor_shortage(error: BaseException | None) -> OSError | None:
    """Find "too many open files" (EMFILE) among an error and its causes; None if it is not there.

    Such an error says nothing about the file that could not be opened.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return error
        error = error.__cause__ or error.__context__
    return None


@cache
def _warn_of_shortage(limit: int) -> None:
    """Warn once per process that it continues, but slower: every later shortage would repeat the message."""
    logger.warning(
        "this process has reached its limit of %d open files and closed mapped shards to continue. Raise the limit "
        "(ulimit -n).",
        limit,
    )


def map_file(file: IO[bytes]) -> mmap.mmap | bytes:
    """Memory-map an open file for reading; the caller may then close it. Returns b"" for an empty file."""
    if not os.fstat(file.fileno()).st_size:
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
