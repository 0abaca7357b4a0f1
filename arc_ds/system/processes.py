"""Worker processes of the shard tools, and processes that end with their parent."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Semaphore

from arc_ds.errors import ArcError, DataError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


@contextmanager
def worker_pool(
    num_workers: int, begin: Callable[..., None] | None = None, *args: object
) -> Iterator[ProcessPoolExecutor]:
    """Processes that each call `begin(*args)` first. They ignore Ctrl-C and end with this process.

    An error of `arc_ds.errors` that `begin` raises arrives as itself. DataError if a worker dies or cannot be started.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads half-way
    if num_workers < 1:
        raise DataError(f"{num_workers} workers cannot do anything. Give at least 1 (--workers).")
    failures = context.SimpleQueue()
    gate = context.Semaphore(0)
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(), gate, failures, begin, args)
    )
    workers: set[BaseProcess] = set()
    others = set(multiprocessing.active_children())
    try:
        try:
            with _keyboard_interrupt_held():
                _start_workers(pool, num_workers)
        finally:
            for _ in range(num_workers):
                gate.release()
            workers = set(multiprocessing.active_children()) - others
        yield pool
    except BrokenProcessPool as error:
        # Python ends the workers of a broken pool, except one that it was just starting: it waits for that one forever.
        for worker in workers:
            worker.kill()
        if not failures.empty():
            raise failures.get() from error
        raise DataError(
            "a worker process died, most likely for lack of memory. Run the same command again with fewer --workers. "
            "(A script of your own that starts workers must do so below `if __name__ == '__main__':`.)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_workers(pool: ProcessPoolExecutor, num_workers: int) -> None:
    """Start every worker now: Python may miss the death of one that it starts later, for a task.

    Each submission starts a worker, because none becomes idle before the gate opens.

    SIGINT is blocked meanwhile, so that a worker never hears of it: it inherits the mask.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        for _ in range(num_workers):
            pool.submit(abs, 0)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) is None:  # Python has closed the pipes, because a worker died
            raise BrokenProcessPool(str(error)) from error
        raise DataError(f"{num_workers} workers cannot be started: {error}. Give fewer --workers.") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _keyboard_interrupt_held() -> Iterator[None]:
    """Deliver a SIGINT at the end of the block instead of in it.

    If another thread receives the signal, the mask of the main thread does not keep KeyboardInterrupt out. Raised
    while a worker starts, it would leave a process that the pool does not know and never stops.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():  # it is never raised here
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def _begin_worker(
    parent: int,
    gate: Semaphore,
    failures: SimpleQueue[ArcError],
    begin: Callable[..., None] | None,
    args: tuple[object, ...],
) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers share the host's cores
    try:
        if begin is not None:
            begin(*args)
    except ArcError as error:
        failures.put(error)
        os._exit(1)
    gate.acquire()


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies (Linux only).

    parent: its process number, for a process that may be called after that one has died; it ends itself then. Note that
        the kernel treats the *thread* that started this process as its parent (prctl(2)).
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        logger.warning("cannot tie this process to its parent: %s", os.strerror(ctypes.get_errno()))
    elif os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
