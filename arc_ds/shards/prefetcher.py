"""Fetching shards ahead of their use, beside the reading."""

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
    """Fetches shards of a set, one after the other, in a thread that ends when there is nothing left.

    What is wanted at once is bounded by half of the cache, so that nothing is fetched in place of what is read now.
    Each process has a thread of its own: they share the work, because each passes over what another is fetching.
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
        """Whether it was made in this process: a thread does not cross a fork."""
        return self._process == os.getpid()

    def want(self, shard_idxs: Sequence[int]) -> None:
        """Begin to fetch these in order, instead of what was wanted before and not begun. Returns at once.

        The same again does nothing.
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
        """The first of the shards, as far as half of the cache reaches."""
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
            except StorageError as error:  # whoever reads the shard tries again, and is told
                logger.warning("not fetched ahead: %s", error)
            except BaseException:  # ends this thread; the next want begins another
                with self._lock:
                    self._is_running = False
                raise

    def _next(self) -> int | None:
        with self._lock:
            self._is_running = bool(self._wanted)
            return self._wanted.popleft() if self._wanted else None
