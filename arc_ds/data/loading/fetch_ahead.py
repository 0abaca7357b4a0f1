"""Fetch remote shards before they are read. The order tells which shards come next."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import RunOrder


class FetchAhead:
    """Asks remote sources for the shards of the current shuffle window, and then for those of the next one."""

    def __init__(self, order: RunOrder, sources: Sequence[Source]) -> None:
        self._order = order
        self._remote = {
            idx: source.shards for idx, source in enumerate(sources) if source.shards.files.cache is not None
        }
        self._requested: dict[int, object] = {}

    def at(self, step: int) -> None:
        """Request the shards for a step, without waiting. Call it before the step is read.

        It does nothing if all shards are local.
        """
        if not self._remote:
            return
        windows = self._order.windows(step)
        for source_idx in self._remote.keys() & windows.keys():
            if self._requested.get(source_idx) != windows[source_idx]:
                self._requested[source_idx] = windows[source_idx]
                current, following = windows[source_idx]
                self._remote[source_idx].prefetch([*current, *(following if self._fits() else ())])

    def _fits(self) -> bool:
        """Whether the cache holds two windows of every source. Otherwise, prefetching would evict shards in use."""
        num_shards = 2 * self._order.window_shards
        sizes = [map(shards.files.num_bytes, shards.manifest.shards) for shards in self._remote.values()]
        needed = sum(sum(heapq.nlargest(num_shards, of_source)) for of_source in sizes)
        caches = (shards.files.cache for shards in self._remote.values())
        return all(cache is None or needed <= cache.max_bytes for cache in caches)
