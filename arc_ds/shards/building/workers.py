"""Worker processes of a build: they turn batches into records, in order, with a bounded number in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from arc_ds.shards.building.batches import Batch, InputFile
from arc_ds.shards.building.record_maker import EncodedBatch, RecordMaker, RecordRules
from arc_ds.system.processes import worker_pool
from arc_ds.tokenizers import Tokenizer, load_tokenizer

_AHEAD = 2  # batches in flight per worker, so that a worker never waits for its next batch


class BatchJob(NamedTuple):
    """A batch of the input number `file_idx`."""

    file_idx: int
    file: InputFile
    batch: Batch


def make_in_order(
    jobs: Iterable[BatchJob], *, rules: RecordRules, tokenizer: Tokenizer, tokenizer_folder: Path, num_workers: int
) -> Generator[tuple[BatchJob, EncodedBatch], None, None]:
    """Yield each job with its records, in order. The result does not depend on the number of workers.

    jobs: the batches to process.
    rules: rules for the records.
    tokenizer: the encoder's tokenizer.
    tokenizer_folder: folder to which the tokenizer is saved for the workers.
    num_workers: maximum number of worker processes. At most one is started per job; a single worker runs in this
        process.

    Raises DataError if a worker dies.
    """
    jobs = iter(jobs)
    first = list(islice(jobs, num_workers))
    jobs = chain(first, jobs)
    if len(first) <= 1:
        maker = RecordMaker(rules, tokenizer)
        for job in jobs:
            yield job, maker.make(job.file, job.batch)
        return
    tokenizer_folder.mkdir(exist_ok=True)
    tokenizer.save(tokenizer_folder)
    with worker_pool(len(first), _begin, rules, tokenizer_folder) as pool:
        yield from _bounded(pool, jobs, num_workers * _AHEAD)


def _bounded(
    pool: ProcessPoolExecutor, jobs: Iterable[BatchJob], limit: int
) -> Iterator[tuple[BatchJob, EncodedBatch]]:
    under_way: deque[tuple[BatchJob, Future[EncodedBatch]]] = deque()
    for job in jobs:
        under_way.append((job, pool.submit(_make, job.file, job.batch)))
        if len(under_way) == limit:
            first, made = under_way.popleft()
            yield first, made.result()
    while under_way:
        first, made = under_way.popleft()
        yield first, made.result()


_maker: RecordMaker | None = None  # of a worker process


def _begin(rules: RecordRules, tokenizer_folder: Path) -> None:
    global _maker
    _maker = RecordMaker(rules, load_tokenizer(tokenizer_folder))


def _make(file: InputFile, batch: Batch) -> EncodedBatch:
    assert _maker is not None, "a worker calls _begin before _make"
    return _maker.make(file, batch)
