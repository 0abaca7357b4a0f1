"""The data workers of a run: processes that make the batches of its steps.

`BatchLoader` is their only owner. It starts them, waits for their batches, notices that one died, and ends them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.micro_batches import pack_again
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.errors import ArcError, DataError
from arc_ds.shards.mappings import raise_descriptor_limit
from arc_ds.system.processes import die_with_parent

_PREFETCH = 4  # batches that each worker may be ahead
_POLL_S = 0.1


@dataclass
class BatchLoader(Iterator[StepBatch]):
    """This rank's batches of `steps`, in order. A context manager: the workers live inside its block.

    No way out of the block waits for a worker, because one may be blocked on a dead server: workers are killed.

    data: any number of workers gives the same batches.
    num_workers: 0: this process makes the batches.
    pin_memory: whether batches use page-locked memory, which allows asynchronous copies to the device.
    is_stopped: whether this rank has received a stop request; polled while waiting for a batch.
    """

    data: StepData
    steps: Sequence[int]
    num_workers: int
    pin_memory: bool = False
    is_stopped: Callable[[], bool] = lambda: False
    _items: Iterator[StepBatch | ArcError] = field(init=False)
    _workers: list[BaseProcess] = field(init=False)

    def __enter__(self) -> BatchLoader:
        loader = DataLoader(
            _ErrorsAsItems(self.data),
            batch_size=None,
            sampler=self.steps,
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCH if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
            worker_init_fn=partial(_begin_worker, os.getpid()),
        )
        others = multiprocessing.active_children()
        try:
            self._items = iter(loader)
            if self.num_workers:
                # Otherwise torch's SIGCHLD handler would raise an error at any line when a worker dies. We poll.
                _remove_worker_pids(id(self._items))
        except BaseException:  # perhaps there is no memory for another worker
            _kill(worker for worker in multiprocessing.active_children() if worker not in others)
            raise
        self._workers = getattr(self._items, "_workers", [])
        return self

    def __exit__(self, *_: object) -> None:
        # Torch's own shutdown would wait up to ten seconds for each stuck worker, and for its pinning thread, which may
        # wait for the rest of a killed worker's message.
        self._items._shutdown = True  # type: ignore[attr-defined]
        if (pinning_ends := getattr(self._items, "_pin_memory_thread_done_event", None)) is not None:
            pinning_ends.set()
        _kill(self._workers)

    def __next__(self) -> StepBatch:
        """The next batch. Ends after the last step, or as soon as a stop is requested.

        Without workers, the batch in progress is completed first. Raises DataError if a worker died, or if a record is
        invalid and the config does not skip such records.
        """
        if self.is_stopped():
            raise StopIteration
        item = self._wait() if self._workers else next(self._items, None)
        if item is None:
            raise StopIteration
        if isinstance(item, ArcError):
            raise item
        return item

    def repack(self, batch: StepBatch, num_splits: int) -> StepBatch:
        """Repack the samples of a batch into `num_splits` micro-batches per decoder, in this process."""
        again = pack_again(batch, num_splits, self.data.pooling, self.data.limits)
        return again.pin_memory() if self.pin_memory else again

    def _wait(self) -> StepBatch | ArcError | None:
        """The next item from the workers. None after the last one, and as soon as a stop is requested.

        After a stop, the waiting thread continues. It does not keep the process alive.
        """
        item: Future[StepBatch | ArcError | None] = Future()
        threading.Thread(target=_settle, args=(item, self._items), daemon=True).start()
        while not wait([item], timeout=_POLL_S).done:
            if self.is_stopped():
                return None
            self._check_workers()
        try:
            return item.result()
        except Exception:  # torch has no exception class for a worker that died
            self._check_workers()
            raise

    def _check_workers(self) -> None:
        for worker in self._workers:
            if worker.exitcode is not None:
                raise DataError(
                    f"data worker {worker.pid} died with exit code {worker.exitcode}, most likely because the host ran "
                    "out of memory. Lower data.num_workers or the number of ranks on this host."
                )


@dataclass
class _ErrorsAsItems(Dataset["StepBatch | ArcError"]):
    """Returns our errors instead of raising them, because torch would replace their message by a traceback."""

    data: StepData

    def __getitem__(self, step: int) -> StepBatch | ArcError:
        try:
            return self.data[step]
        except ArcError as error:
            return error


def _settle(item: Future[StepBatch | ArcError | None], items: Iterator[StepBatch | ArcError]) -> None:
    try:
        item.set_result(next(items, None))
    except BaseException as error:  # `item.result()` raises it again
        item.set_exception(error)


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Python itself would wait for them at the end of the process: they ignore its SIGTERM."""
    for worker in workers:
        worker.kill()


def _begin_worker(rank_pid: int, _: int) -> None:
    """Set up a worker: one thread, because all workers share the host's cores, and as many open files as allowed.

    A scheduler that stops a job signals all of its processes. A rank then saves at the next step boundary, and needs
    its workers until then. So workers ignore the signals, and end with their rank. If a rank were killed, its workers
    would otherwise block forever while handing over their batches.
    """
    die_with_parent(rank_pid)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # A command that a worker runs would inherit SIG_IGN, and could not be ended by SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: None)
    raise_descriptor_limit()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
