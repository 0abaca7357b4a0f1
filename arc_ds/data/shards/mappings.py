"""Mapped files, within one budget of the whole process.

A mapping holds a file descriptor, of which a process may have as few as 1024 in all, and a data worker maps several
files of each shard of each source. What is mapped stays until others need its place.
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
from typing import IO, Any, TypeVar
from weakref import WeakValueDictionary

from arc_ds.errors import ArcError, StorageError

logger = logging.getLogger(__name__)

_MAX_MAPPED = 4096  # files; the page tables of a shard that was read all over take 1/512 of its size in each process
_MAX_LIMIT = 65536  # more is of no use, and programs that close every descriptor there may be would take minutes

_T = TypeVar("_T")


class Mappings(dict[int, _T]):
    """Some files by their number, mapped when first wanted: `mappings[idx]`, which costs a dict's look-up.

    All of the process together take at most half of its descriptors: the files that were not used for longest are let
    go, whoever mapped them. A mapping lives on while somebody holds it or a view of it, and through a fork.
    """

    def __init__(self, open_one: Callable[[int], _T], *, num_files: int = 1, most: int | None = None) -> None:
        """open_one: maps what has a number. num_files: that one of these maps. most: of these that are held at once,
        None: as many as the process may."""
        super().__init__()
        self._open_one = open_one
        self._num_files = num_files
        # The dict itself holds what was used since the last turn, this what was not: a hit has nothing to note then,
        # which would cost more than the look-up.
        self._unused: dict[int, _T] = {}
        self._budgets = [_process] if most is None else [_process, _Budget(lambda: most * num_files)]
        for budget in self._budgets:
            budget.add(self)

    def __missing__(self, idx: int) -> _T:
        found = self._unused.pop(idx, None)
        self[idx] = mapping = self._opened(idx) if found is None else found
        return mapping

    def _opened(self, idx: int) -> _T:
        for budget in self._budgets:
            budget.make_room(self._num_files)
        return with_descriptors(partial(self._open_one, idx))

    @property
    def num_held(self) -> int:
        """Files that are mapped."""
        return (len(self) + len(self._unused)) * self._num_files

    @property
    def num_unused(self) -> int:
        """Those of them that were not used since the last turn."""
        return len(self._unused) * self._num_files

    def turn(self) -> None:
        """Count nothing as used from now on."""
        self._unused |= self
        self.clear()

    def let_some_go(self) -> None:
        """An eighth of what was not used since the last turn: first what was used first before it."""
        for idx in list(islice(self._unused, -(-len(self._unused) // 8))):
            self._unused.pop(idx, None)

    def let_all_go(self) -> None:
        self.clear()
        self._unused.clear()


class _Budget:
    """How many files some mappings hold among them. Threads need no lock: at worst a file is mapped twice."""

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._sets: WeakValueDictionary[int, Mappings[Any]] = WeakValueDictionary()  # by id: dicts have no hash
        self._left = 0  # files for which there is room for certain: to count takes time

    def add(self, mappings: Mappings[Any]) -> None:
        self._sets[id(mappings)] = mappings

    def make_room(self, num_files: int) -> None:
        """For some files more, where need be in place of those that were not used for longest."""
        self._left -= num_files
        if self._left >= 0:
            return
        sets, most = list(self._sets.values()), self._most() - num_files
        while (num_held := sum(each.num_held for each in sets)) > most and num_held:
            for each in sets:
                each.let_some_go()
            # Well before the last of them is gone: what is in use is then used again before it would be let go.
            if sum(each.num_unused for each in sets) <= num_held // 2:
                for each in sets:
                    each.turn()
        self._left = most - num_held

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


_process = _Budget(_most_of_process)


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
