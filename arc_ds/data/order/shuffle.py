"""The order of one source's records in each epoch, as a pure function of (key, epoch)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from arc_ds.data.order.randomness import permutation


class WindowShuffle:
    """Permutes the shards, and the records within windows of shards, anew in every epoch.

    Reads stay local: at any time, only the shards of one window (two at its end) are read.
    """

    def __init__(self, shard_sizes: Sequence[int], window_shards: int, key: tuple[int, ...]) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.cumsum(self._sizes) - self._sizes
        self._num_records = int(self._sizes.sum())
        self._window_shards = window_shards
        self._key = key
        self._layout = lru_cache(maxsize=2)(self._make_layout)
        self._window = lru_cache(maxsize=3)(self._make_window)

    def __reduce__(self) -> tuple[type[WindowShuffle], tuple[list[int], int, tuple[int, ...]]]:
        return WindowShuffle, (self._sizes.tolist(), self._window_shards, self._key)

    def records(self, ranks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch and the record of the source's draws number `ranks`, int64 [N] each. `ranks` must be ascending.

        Epoch e consists of draws e * records to (e + 1) * records - 1. It draws every record once.
        """
        epochs, places = np.divmod(ranks, self._num_records)
        records = np.empty_like(ranks)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            in_epoch = slice(*epochs.searchsorted((epoch, epoch + 1)))
            records[in_epoch] = self._records_of_epoch(epoch, places[in_epoch])
        return epochs, records

    def windows_from(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shards of the window of draw number `rank`, and the shards of the next window."""
        epoch, place = divmod(rank, self._num_records)
        _, bounds = self._layout(epoch)
        window = int(np.searchsorted(bounds, place, side="right")) - 1
        following = (epoch, window + 1) if window + 1 < len(bounds) else (epoch + 1, 0)
        return tuple(self._shards(epoch, window).tolist()), tuple(self._shards(*following).tolist())

    def _shards(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The shards of one window of an epoch."""
        shards, _ = self._layout(epoch)
        return shards[window * self._window_shards : (window + 1) * self._window_shards]

    def _records_of_epoch(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The records at some places (0 … records - 1, ascending) of an epoch."""
        _, bounds = self._layout(epoch)
        windows = bounds.searchsorted(places, side="right") - 1
        found = [
            self._window(epoch, window)[places[windows == window] - bounds[window]]
            for window in range(int(windows[0]), int(windows[-1]) + 1)
        ]
        return np.concatenate(found)

    def _make_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in this epoch's order, and the first place of each window."""
        shards = permutation(len(self._sizes), *self._key, "shards", epoch)
        window_sizes = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self._window_shards))
        return shards, np.cumsum(window_sizes) - window_sizes

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The records of one window in this epoch's order."""
        shards = self._shards(epoch, window)
        records = np.concatenate([np.arange(self._first[s], self._first[s] + self._sizes[s]) for s in shards])
        return records[permutation(len(records), *self._key, "records", epoch, window)]
