"""Processes that share the work of the shard tools. They end with their parent, and the death of one ends the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier

from arc_ds.errors import DataError


@contextmanager
def worker_pool(
    num_workers: int, begin: Callable[..., None] | None = None, *args: object
) -> Iterator[ProcessPoolExecutor]:
    """Processes that each call `begin(*args)` first, and end with this one. DataError where one of them dies."""
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads half-way
    all_begin = context.Barrier(num_workers)
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_begin_process, initargs=(all_begin, begin, args)
    )
    try:
        _start_all(pool, num_workers)
        yield pool
    except BrokenProcessPool as error:
        # Python ends the workers of a broken pool, but for one that it was just starting, which it waits for for ever.
        for worker in set(multiprocessing.active_children()).difference(others):
            worker.kill()
        raise DataError(
            "a worker process died, most likely for lack of memory. Run the same command again with fewer --workers. "
            "(A script of your own that starts workers must do so below `if __name__ == '__main__':`.)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_all(pool: ProcessPoolExecutor, num_workers: int) -> None:
    """Start every worker now, not when there is work for it: later Python would miss that another one dies meanwhile.

    BrokenProcessPool where that happens here, which Python may tell by an error about pipes that it has closed.
    """
    try:
        for _ in range(num_workers):
            pool.submit(abs, 0)  # none is idle before all begin, so each starts another one
    except (OSError, ValueError) as error:
        raise BrokenProcessPool(f"the workers cannot be started: {error}") from error


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_process(all_begin: Barrier, begin: Callable[..., None] | None, args: tuple[object, ...]) -> None:
    """Ctrl-C is for the parent to handle; a worker ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    all_begin.wait()
    if begin is not None:
        begin(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)
