"""Shards behind URLs are fetched before they are read: the order tells which ones come."""

from __future__ import annotations

from collections.abc import Sequence

from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import RunOrder


class FetchAhead:
    """Asks the sources behind URLs for the shards that a run reads soon: this shuffle window's, then the next one's."""

    def __init__(self, order: RunOrder, sources: Sequence[Source]) -> None:
        self._order = order
        self._remote = {
            idx: source.shards for idx, source in enumerate(sources) if source.shards.files.cache is not None
        }
        self._asked: dict[int, object] = {}

    def at(self, step: int) -> None:
        """To be called before the step is read; returns at once. Does nothing where all shards are on the disk."""
        if not self._remote:
            return
        windows = self._order.windows(step)
        for source_idx in self._remote.keys() & windows.keys():
            if self._asked.get(source_idx) != windows[source_idx]:
                self._asked[source_idx] = windows[source_idx]
                current, following = windows[source_idx]
                self._remote[source_idx].prefetch([*current, *(following if self._fits() else ())])

    def _fits(self) -> bool:
        """Whether the cache holds two windows of every source; else fetching ahead would put out what is being read."""
        needed = 0
        for shards in self._remote.values():
            largest = sorted(map(shards.files.num_bytes, shards.manifest.shards), reverse=True)
            needed += sum(largest[: 2 * self._order.window_shards])
        return all(
            shards.files.cache is None or needed <= shards.files.cache.max_bytes for shards in self._remote.values()
        )
