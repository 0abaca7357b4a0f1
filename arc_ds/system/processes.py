"""Processes that share the work of the shard tools. They end with their parent, and the death of one ends the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

from arc_ds.errors import ArcError, DataError


@contextmanager
def worker_pool(
    num_workers: int, begin: Callable[..., None] | None = None, *args: object
) -> Iterator[ProcessPoolExecutor]:
    """Processes that each call `begin(*args)` first, and end with this one.

    DataError where one of them dies or cannot be started; what `begin` raises of `arc_ds.errors`.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads half-way
    all_begin, told = context.Barrier(num_workers), context.SimpleQueue()
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_begin_process, initargs=(all_begin, told, begin, args)
    )
    workers: list[BaseProcess] = []
    try:
        workers = _start_all(pool, num_workers)
        yield pool
    except BrokenProcessPool as error:
        _kill(workers)
        if not told.empty():
            raise told.get() from error
        raise DataError(
            "a worker process died, most likely for lack of memory. Run the same command again with fewer --workers. "
            "(A script of your own that starts workers must do so below `if __name__ == '__main__':`.)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_all(pool: ProcessPoolExecutor, num_workers: int) -> list[BaseProcess]:
    """Start every worker now, not when there is work for it: later Python would miss that another one dies meanwhile.

    BrokenProcessPool where that happens here. Where they do not all come to be, none is left: those that are there
    wait for the others.
    """
    others = set(multiprocessing.active_children())
    try:
        with _without_ctrl_c():  # nor do the workers hear of it, from their first moment on
            for _ in range(num_workers):
                pool.submit(abs, 0)  # none is idle before all begin, so each starts another one
    except BaseException as error:
        _kill(set(multiprocessing.active_children()) - others)
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{num_workers} workers cannot be started: {error}. Give fewer --workers.") from error
        if isinstance(error, OSError | ValueError):  # of pipes that Python has closed, since a worker died
            raise BrokenProcessPool(str(error)) from error
        raise
    return [worker for worker in multiprocessing.active_children() if worker not in others]


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Python ends a broken pool's workers, but for one that it was just starting, which it would wait for for ever."""
    for worker in workers:
        worker.kill()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """SIGINT waits for the end of the block, and for ever in processes that start in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # what new processes inherit
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # Python handles signals there, whoever gets them
    former = signal.signal(signal.SIGINT, lambda number, _: received.append(number)) if is_main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_main:
            signal.signal(signal.SIGINT, former)
    if received and callable(former):
        former(signal.SIGINT, None)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_process(
    all_begin: Barrier, told: SimpleQueue[ArcError], begin: Callable[..., None] | None, args: tuple[object, ...]
) -> None:
    """Ctrl-C is for the parent to handle; a worker ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers share the host's cores
    all_begin.wait()
    if begin is None:
        return
    try:
        begin(*args)
    except ArcError as error:
        told.put(error)
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)
