"""Applies a function to items in worker processes, in order and with a bounded number of items in flight."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from arc_ds.errors import StorageError
from arc_ds.system.locks import LOCK_FILE
from arc_ds.system.processes import worker_pool

AHEAD = 2  # items in flight per worker, so that a worker never waits for its next item
_T = TypeVar("_T")
_R = TypeVar("_R")


class Engine(Protocol):
    """Runs the tasks of a build: `map_in_order` in processes of this host, `ray_engine.map_on_ray` on many hosts."""

    def __call__(
        self, function: Callable[[_T], _R], items: Iterable[_T], num_workers: int, /
    ) -> Generator[tuple[_T, _R], None, None]: ...


def map_in_order(
    function: Callable[[_T], _R], items: Iterable[_T], num_workers: int
) -> Generator[tuple[_T, _R], None, None]:
    """Yield each item with its result, in order. The results do not depend on the number of workers.

    function: function to apply. Each worker process receives it once, pickled.
    items: the items, also pickled for the workers.
    num_workers: maximum number of worker processes. At most one is started per item; a single worker runs in this
        process.

    Raises DataError if a worker dies.
    """
    items = iter(items)
    first = list(islice(items, max(num_workers, 1)))
    items = chain(first, items)
    if len(first) <= 1:
        yield from ((item, function(item)) for item in items)
        return
    in_flight: deque[tuple[_T, Future[_R]]] = deque()
    with worker_pool(len(first), _begin, function) as pool:
        for item in items:
            in_flight.append((item, pool.submit(_call, item)))
            if len(in_flight) == len(first) * AHEAD:
                oldest, future = in_flight.popleft()
                yield oldest, future.result()
        yield from ((item, future.result()) for item, future in in_flight)


_function: Callable[[Any], Any] | None = None  # of a worker process


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _call(item: Any) -> Any:
    assert _function is not None, "a worker calls _begin before _call"
    return _function(item)


def on_shared_folder(folder: Path, function: Callable[[_T], _R]) -> Callable[[_T], _R]:
    """`function`, but it raises StorageError on a host that does not see the lock that this process holds on `folder`.

    Hosts may have folders of the same name on disks of their own.
    """
    return partial(_call_on_shared_folder, folder, (folder / LOCK_FILE).read_bytes(), function)


def _call_on_shared_folder(folder: Path, holder: bytes, function: Callable[[_T], _R], item: _T) -> _R:
    try:
        is_shared = (folder / LOCK_FILE).read_bytes() == holder
    except OSError:
        is_shared = False
    if not is_shared:
        raise StorageError(
            f"{socket.gethostname()} does not see the files of this command in {folder}. All hosts of a Ray cluster "
            "must share the file system of the output: give an output folder on it, or leave out --ray-address."
        )
    return function(item)
