"""Worker processes of the shard tools: batches become records, in order, with few of them under way at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from arc_ds.shards.building.batches import Batch, InputFile
from arc_ds.shards.building.record_maker import MadeBatch, RecordMaker, RecordRules
from arc_ds.system.processes import worker_pool
from arc_ds.tokenizers import Tokenizer, load_tokenizer

_AHEAD = 2  # batches under way for each worker: the next one is there when one is done


class Work(NamedTuple):
    """A batch of the input number `file_idx`."""

    file_idx: int
    file: InputFile
    batch: Batch


def make_in_order(
    works: Iterable[Work], *, rules: RecordRules, tokenizer: Tokenizer, tokenizer_folder: Path, num_workers: int
) -> Generator[tuple[Work, MadeBatch], None, None]:
    """The works with what was made of them, in their order; the same for any number of workers.

    tokenizer_folder: where the workers find the tokenizer; it is written there for them. No more workers are started
    than there are works, and with one everything happens in this process. DataError where a worker dies.
    """
    works = iter(works)
    first = list(islice(works, num_workers))
    works = chain(first, works)
    if len(first) <= 1:
        maker = RecordMaker(rules, tokenizer)
        for work in works:
            yield work, maker.make(work.file, work.batch)
        return
    tokenizer_folder.mkdir(exist_ok=True)
    tokenizer.save(tokenizer_folder)
    with worker_pool(len(first), _begin, rules, tokenizer_folder) as pool:
        yield from _bounded(pool, works, num_workers * _AHEAD)


def _bounded(pool: ProcessPoolExecutor, works: Iterable[Work], limit: int) -> Iterator[tuple[Work, MadeBatch]]:
    under_way: deque[tuple[Work, Future[MadeBatch]]] = deque()
    for work in works:
        under_way.append((work, pool.submit(_make, work.file, work.batch)))
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


def _make(file: InputFile, batch: Batch) -> MadeBatch:
    assert _maker is not None, "a worker begins before it works"
    return _maker.make(file, batch)
