"""Fetch remote shards before they are read. The order tells which shards come next."""

from __future__ import annotations

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
        self._asked: dict[int, object] = {}

    def at(self, step: int) -> None:
        """Request the shards for a step, without waiting. Call it before the step is read.

        It does nothing if all shards are local.
        """
        if not self._remote:
            return
        windows = self._order.windows(step)
        for source_idx in self._remote.keys() & windows.keys():
            if self._asked.get(source_idx) != windows[source_idx]:
                self._asked[source_idx] = windows[source_idx]
                current, following = windows[source_idx]
                self._remote[source_idx].prefetch([*current, *(following if self._fits() else ())])

    def _fits(self) -> bool:
        """Whether the cache holds two windows of every source. Otherwise, prefetching would evict shards in use."""
        needed = 0
        for shards in self._remote.values():
            largest = sorted(map(shards.files.num_bytes, shards.manifest.shards), reverse=True)
            needed += sum(largest[: 2 * self._order.window_shards])
        return all(
            shards.files.cache is None or needed <= shards.files.cache.max_bytes for shards in self._remote.values()
        )
