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
    """

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        self._last: tuple[int, ...] = ()
        self._wanted: deque[int] = deque()
        self._lock = threading.Lock()
        self._is_running = False
        self._process = os.getpid()

    @property
    def is_mine(self) -> bool:
        """Whether this process created the object. A thread does not survive a fork."""
        return self._process == os.getpid()

    def want(self, shard_idxs: Sequence[int]) -> None:
        """Start fetching these shards in order and return at once. They replace the shards that are still queued.

        Repeating the same request does nothing.
        """
        if tuple(shard_idxs) == self._last:
            return
        self._last = tuple(shard_idxs)
        with self._lock:
            self._wanted = deque(self._fitting(shard_idxs))
            if self._wanted and not self._is_running:
                threading.Thread(target=self._run, name="shard-prefetch", daemon=True).start()
                self._is_running = True

    def _fitting(self, shard_idxs: Sequence[int]) -> list[int]:
        """The longest prefix of the shards that fits in half of the cache."""
        if self._files.cache is None:
            return []
        room, fitting = self._files.cache.max_bytes // 2, []
        for shard_idx in shard_idxs:
            room -= self._files.num_bytes(self._files.manifest.shards[shard_idx])
            if room < 0:
                break
            fitting.append(shard_idx)
        return fitting

    def _run(self) -> None:
        while (shard_idx := self._next()) is not None:
            try:
                self._files.bring(self._files.manifest.shards[shard_idx])
            except StorageError as error:  # the reader of the shard retries and sees the error
                logger.warning("not fetched ahead: %s", error)
            except BaseException:  # ends this thread; the next call of `want` starts another
                with self._lock:
                    self._is_running = False
                raise

    def _next(self) -> int | None:
        with self._lock:
            self._is_running = bool(self._wanted)
            return self._wanted.popleft() if self._wanted else None
