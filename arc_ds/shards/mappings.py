"""Mapped files, within budgets of the whole process.

A mapping holds a file descriptor, of which a process may have as few as 1024 in all, and a data worker maps several
files of each shard of each source. One of a file that was fetched also keeps it from making room in its cache. What is
mapped stays until others need its place.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, TypeVar
from weakref import WeakValueDictionary

from arc_ds.errors import ArcError, StorageError
from arc_ds.shards.storage.cache import ShardCache

logger = logging.getLogger(__name__)

_MAX_MAPPED = 4096  # files; the page tables of a shard that was read all over take 1/512 of its size in each process
_MAX_LIMIT = 65536  # more is of no use, and programs that close every descriptor there may be would take minutes

_T = TypeVar("_T")


class Mappings(dict[int, _T]):
    """Some files by their number, mapped when first wanted: `mappings[idx]`, which costs a dict's look-up.

    All of the process together take at most half of its descriptors: the files that were not used for longest are let
    go, whoever mapped them. All of the files of one cache take at most a quarter of it, likewise, or one each of these
    where that is more. A mapping lives on while somebody holds it or a view of it, and through a fork.
    """

    def __init__(
        self,
        open_one: Callable[[int], _T],
        *,
        num_files: int = 1,
        num_bytes: int = 0,
        cache: ShardCache | None = None,
    ) -> None:
        """open_one: maps what has a number, and keeps no reference to who holds these. num_files, num_bytes: that one
        of these maps at most. cache: that the files are fetched into, None where they are local."""
        super().__init__()
        self.num_files = num_files
        self.num_bytes = num_bytes
        self._open_one = open_one
        # The dict itself holds what was used since the last turn, this what was not: a hit has nothing to note then,
        # which would cost more than the look-up.
        self._unused: dict[int, _T] = {}
        self._budgets = [_process] if cache is None else [_process, _budget_of(cache)]
        for budget in self._budgets:
            budget.add(self)

    def __missing__(self, idx: int) -> _T:
        found = self._unused.pop(idx, None)
        self[idx] = mapping = self._opened(idx) if found is None else found
        return mapping

    def _opened(self, idx: int) -> _T:
        for budget in self._budgets:
            budget.make_room(self)
        return with_descriptors(partial(self._open_one, idx))

    @property
    def num_held(self) -> int:
        """How many of these are mapped."""
        return len(self) + len(self._unused)

    @property
    def num_unused(self) -> int:
        """Those of them that were not used since the last turn."""
        return len(self._unused)

    def turn(self) -> None:
        """Count nothing as used from now on."""
        self._unused |= self
        self.clear()

    def let_some_go(self, most: int) -> None:
        """An eighth of what was not used since the last turn, `most` at most: first what was used first before it."""
        for idx in list(islice(self._unused, min(-(-len(self._unused) // 8), most))):
            self._unused.pop(idx, None)

    def let_all_go(self) -> None:
        self.clear()
        self._unused.clear()


class _Budget:
    """How much some mappings hold among them. Threads need no lock: at worst a file is mapped twice."""

    def __init__(self, most: Callable[[], int], size: Callable[[Mappings[Any]], int], *, each_keeps: int = 0) -> None:
        """most: that they may hold. size: of one mapping of a set. each_keeps: how many mappings a set need not let go
        for another."""
        self._most = most
        self._size = size
        self._each_keeps = each_keeps
        self._sets: WeakValueDictionary[int, Mappings[Any]] = WeakValueDictionary()  # by id: dicts have no hash
        self._left = 0  # room that there is for certain: to count takes time

    def add(self, mappings: Mappings[Any]) -> None:
        self._sets[id(mappings)] = mappings

    def make_room(self, wanting: Mappings[Any]) -> None:
        """For one mapping more of a set, where need be in place of those that were not used for longest."""
        self._left -= self._size(wanting)
        if self._left >= 0:
            return
        sets, most = list(self._sets.values()), self._most() - self._size(wanting)
        while (held := sum(each.num_held * self._size(each) for each in sets)) > most:
            spare = [(each, num) for each in sets if (num := each.num_held - self._kept(each, wanting)) > 0]
            if not spare:
                break
            for each, num in spare:
                each.let_some_go(num)
            # Well before the last of them is gone: what is in use is then used again before it would be let go.
            if sum(each.num_unused * self._size(each) for each, _ in spare) <= held // 2:
                for each in sets:
                    each.turn()
        self._left = most - held

    def _kept(self, mappings: Mappings[Any], wanting: Mappings[Any]) -> int:
        """Of a set, what stays while another wants room."""
        return 0 if mappings is wanting else self._each_keeps

    def empty(self) -> bool:
        """Let everything go, and tell whether there was anything."""
        sets = list(self._sets.values())
        num_held = sum(each.num_held for each in sets)
        for each in sets:
            each.let_all_go()
        self._left = 0
        return num_held > 0


def _most_of_process() -> int:
    """The other half is for sockets, pipes and devices, and for what a child inherits."""
    soft, _ = _limits()
    return _MAX_MAPPED if soft == resource.RLIM_INFINITY else min(soft // 2, _MAX_MAPPED)


_process = _Budget(_most_of_process, attrgetter("num_files"))
_caches: WeakValueDictionary[Path, _Budget] = WeakValueDictionary()


def _budget_of(cache: ShardCache) -> _Budget:
    """Of the bytes of a cache's folder that this process keeps there, as it is not the only one that does. While it
    maps any, its bound is the one that came first."""
    budget = _caches.get(cache.folder)
    if budget is None:
        budget = _caches[cache.folder] = _Budget(lambda: cache.max_bytes // 4, attrgetter("num_bytes"), each_keeps=1)
    return budget


def with_descriptors(open_files: Callable[[], _T]) -> _T:
    """What a function returns that opens files, for which mapped ones are let go where no descriptor is left.

    StorageError with the cure where there is none though nothing is mapped.
    """
    while True:
        try:
            return open_files()
        except (ArcError, OSError) as error:
            reason = _no_descriptor(error)
            if reason is None:
                raise
            if not _process.empty():
                raise _no_descriptor_error(reason) from error
            _warn_of_descriptors()


def map_file(file: IO[bytes]) -> mmap.mmap | bytes:
    """All bytes of an open file, mapped for reading; it may be closed then. An empty one cannot be mapped: b""."""
    if not os.fstat(file.fileno()).st_size:
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def is_out_of_descriptors(error: BaseException) -> bool:
    """Whether an error comes of too many open files, which says nothing about the file that was to be opened."""
    return _no_descriptor(error) is not None


def raise_descriptor_limit() -> None:
    """Raise the number of files that this process and its children may have open to what the system allows (at most
    65536). Where it forbids that, all stays as it was."""
    soft, hard = (_MAX_LIMIT if limit == resource.RLIM_INFINITY else limit for limit in _limits())
    if soft < min(hard, _MAX_LIMIT):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _MAX_LIMIT), _limits()[1]))


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


@cache
def _warn_of_descriptors() -> None:
    """Once a process: it goes on, slower, but others in it will meet the same."""
    logger.warning(
        "%d files are open, which is all that this process may have: mapped shards were closed to go on. Raise the "
        "limit (ulimit -n).",
        _limits()[0],
    )


def _no_descriptor(error: BaseException | None) -> OSError | None:
    """The error below this one that tells of too many open files, None where there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return error
        error = error.__cause__ or error.__context__
    return None


def _no_descriptor_error(reason: OSError) -> StorageError:
    soft, hard = _limits()
    return StorageError(
        f"{reason.filename or 'A shard'} cannot be opened: all {soft} files that this process may have open are taken, "
        f"none of them by shards. Raise the limit (as by ulimit -n {max(4 * soft, 4096)}; without an administrator up "
        f"to {hard}) and start again: a run goes on where it stopped."
    )
