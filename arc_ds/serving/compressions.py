"""Compress the contexts of many requests as batches, with a cache, in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Semaphore
from typing import NamedTuple

from torch import Tensor

from arc_ds.batch.segments import Segment
from arc_ds.inference.arc import ArcModel
from arc_ds.inference.vectors import model_digest
from arc_ds.serving.cache import VectorCache, vector_key
from arc_ds.serving.generation import as_request_error
from arc_ds.serving.metrics import Metrics
from arc_ds.serving.protocol import queue_full
from arc_ds.serving.settings import Settings

_MAX_WRITES = 256  # vectors that wait to be written to the disk; more are only kept in memory


class DocumentVectors(NamedTuple):
    """Vectors of a context, and whether they were in the cache."""

    vectors: Tensor
    is_cached: bool


@dataclass(eq=False, slots=True)
class _Item:
    """A context to compress. `callers`: number of requests that wait for it; without any it is not compressed."""

    key: str
    context: Segment
    result: asyncio.Future[DocumentVectors]
    callers: int = 0


class Compressions:
    """Answers `vectors`. A context that several requests need at the same time is compressed once.

    Use it as an asynchronous context manager in the event loop of the server.
    """

    def __init__(self, model: ArcModel, decoder: int, settings: Settings, metrics: Metrics) -> None:
        self._model, self._decoder = model, decoder
        self._settings, self._metrics = settings, metrics
        self._width = model.spec.decoder_sizes[decoder]
        self._digest = model_digest(model)
        self.cache = VectorCache(settings.cache_bytes, settings.cache_dir, settings.disk_bytes)
        self._pending: dict[str, _Item] = {}  # waiting or being compressed
        self._waiting: list[_Item] = []
        self._wake = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, "compress")
        self._writer = ThreadPoolExecutor(1, "cache")
        self._writes = Semaphore(_MAX_WRITES)

    async def __aenter__(self) -> Compressions:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._worker.shutdown()
        self._writer.shutdown()

    async def vectors(self, contexts: Sequence[Segment]) -> list[DocumentVectors]:
        """The vectors of each context, with its marker. Raises RequestError if too many compressions wait."""
        if len(self._waiting) + len(contexts) > self._settings.waiting + self._settings.documents:
            raise queue_full("too many documents wait to be compressed; try again")
        return list(await asyncio.gather(*(self._one(context) for context in contexts)))

    async def _one(self, context: Segment) -> DocumentVectors:
        key = vector_key(self._digest, self._decoder, context)
        found = self.cache.recall(key)
        if found is not None:
            self._metrics.lookups.labels("memory").inc()
            return DocumentVectors(found, True)
        item = self._pending.get(key)
        if item is None:
            item = self._pending[key] = _Item(key, context, asyncio.get_running_loop().create_future())
            self._waiting.append(item)
            self._wake.set()
        else:
            self._metrics.lookups.labels("pending").inc()
        item.callers += 1
        try:
            return await asyncio.shield(item.result)
        finally:
            item.callers -= 1

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._settings.compress_wait_s)
            batch = self._take()
            if batch:
                await self._resolve(batch)

    def _take(self) -> list[_Item]:
        """The next batch: items in order, up to the limit of tokens, and at least one."""
        batch: list[_Item] = []
        room = self._settings.compress_tokens
        while self._waiting and (not batch or len(self._waiting[0].context.ids) <= room):
            item = self._waiting.pop(0)
            if item.callers == 0:
                self._pending.pop(item.key)
                continue
            batch.append(item)
            room -= len(item.context.ids)
        if not self._waiting:
            self._wake.clear()
        return batch

    async def _resolve(self, batch: list[_Item]) -> None:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._worker, self._find, batch)
        except Exception as error:
            if len(batch) > 1:
                for item in batch:  # one of them may be at fault, or they may need too much memory together
                    await self._resolve([item])
                return
            (item,) = batch
            self._pending.pop(item.key)
            item.result.set_exception(as_request_error(error))
            item.result.exception()  # callers may have left; the event loop would report it as never retrieved
            return
        for item, one in zip(batch, found, strict=True):
            self._pending.pop(item.key)
            item.result.set_result(one)
            self._metrics.lookups.labels("disk" if one.is_cached else "nowhere").inc()
        self._metrics.cache_bytes.set(self.cache.used_bytes)

    def _write(self, key: str, vectors: Tensor) -> None:
        try:
            self.cache.write(key, vectors)
        finally:
            self._writes.release()

    def _find(self, batch: list[_Item]) -> list[DocumentVectors]:
        """The vectors of a batch, in the worker's thread: from the disk, or compressed now."""
        found = {item.key: self.cache.read(item.key, self._width) for item in batch}
        missing = [item for item in batch if found[item.key] is None]
        for marker in sorted({item.context.marker for item in missing}, key=str):
            items = [item for item in missing if item.context.marker == marker]
            lines = self._model.compress([item.context.ids for item in items], self._decoder, marker)
            for item, line in zip(items, lines, strict=True):
                vectors = found[item.key] = line.to("cpu", copy=True)  # a slice keeps its whole batch
                self.cache.keep(item.key, vectors)
                if self._settings.cache_dir is not None and self._writes.acquire(blocking=False):
                    self._writer.submit(self._write, item.key, vectors)
                self._metrics.encoder_tokens.inc(len(item.context.ids))
                self._metrics.compressed_rows.inc(len(vectors))
        if missing:
            self._metrics.batches.labels("compress").observe(len(missing))
        new = {item.key for item in missing}
        return [DocumentVectors(vectors, key not in new) for key, vectors in found.items() if vectors is not None]
