"""Fetching shards ahead of use, in a background thread."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence

from arc_ds.errors import StorageError
from arc_ds.shards.files import ShardFiles

logger = logging.getLogger(__name__)


class Prefetcher:
    """Fetches shards of a set one by one in a thread, which ends when the queue is empty.

    The queue holds at most half of the cache, so that prefetching does not evict the shards being read. Each process
    has its own thread. The threads share the work: each skips the shards that another one is fetching.

    process: the process that created the object. A thread does not survive a fork.
    """

    def __init__(self, files: ShardFiles, cache_bytes: int) -> None:
        self._files = files
        self._max_bytes = cache_bytes // 2
        self._wanted: deque[int] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.process = os.getpid()

    def want(self, shard_idxs: Sequence[int]) -> None:
        """Start fetching these shards in order and return at once. They replace the shards that are still queued."""
        with self._lock:
            self._wanted = deque(self._fitting(shard_idxs))
            if self._wanted and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
                self._thread.start()

    def _fitting(self, shard_idxs: Sequence[int]) -> list[int]:
        """The longest prefix of the shards that fits in half of the cache."""
        room, fitting = self._max_bytes, []
        for shard_idx in shard_idxs:
            room -= self._files.num_bytes(self._files.manifest.shards[shard_idx])
            if room < 0:
                break
            fitting.append(shard_idx)
        return fitting

    def _run(self) -> None:
        while (shard_idx := self._next()) is not None:
            try:
                self._files.prefetch(self._files.manifest.shards[shard_idx])
            except StorageError as error:  # the reader of the shard retries and sees the error
                logger.warning("not fetched ahead: %s", error)

    def _next(self) -> int | None:
        with self._lock:
            if not self._wanted:
                self._thread = None  # it is about to end
                return None
            return self._wanted.popleft()
