"""The source of each position of the run: exact quotas in every block of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from arc_ds.data.order.randomness import permutation
from arc_ds.errors import ConfigError

BLOCK = 256  # positions that share one set of quotas
_PERIOD = 256  # blocks after which the quotas repeat; a power of two


class Mixture:
    """Weighted sources with exact counts, not random ones.

    In every block of 256 positions a source gets its exact share, rounded up or down. The roundings balance: over 256
    blocks the share is exact to one part in 65,536. The places within a block are permuted.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises ConfigError if a weight is too small to be drawn. The config checks that weights are above 0."""
        total = math.fsum(weights)
        self._weights = tuple(weights)
        # Samples of sources 0 … idx in one period, rounded. All sources together fill the period.
        quotas = [round(math.fsum(weights[: idx + 1]) / total * BLOCK * _PERIOD) for idx in range(len(weights))]
        counts = _counts(quotas)
        for idx, weight in enumerate(weights):
            if weight > 0 and counts[:, idx].sum() == 0:
                raise ConfigError(
                    f"data.sources[{idx}]: weight {weight} of {total} gives less than one sample in {BLOCK * _PERIOD}. "
                    "Raise it or drop the source."
                )
        self._counts = counts
        self._before = np.cumsum(counts, axis=0) - counts
        self._per_period = counts.sum(axis=0)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def __reduce__(self) -> tuple[type[Mixture], tuple[tuple[float, ...]]]:
        return Mixture, (self._weights,)

    def span(self, seed: int, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source and rank of positions `first` … `first + count - 1`, int64 [count] each.

        The rank of a position is the number of earlier positions of the same source in the whole run.
        """
        blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
        begin = first - blocks.start * BLOCK
        sources, ranks = zip(*(self._block(seed, block) for block in blocks), strict=True)
        places = slice(begin, begin + count)
        return np.concatenate(sources)[places], np.concatenate(ranks)[places]

    def _make_block(self, seed: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and rank within the source of each position of a block, int64 [BLOCK] each."""
        period, row = divmod(block, _PERIOD)
        counts = self._counts[row]
        order = permutation(BLOCK, seed, "mixture", block)
        sources = np.repeat(np.arange(len(counts)), counts)[order]
        ranks = np.zeros(BLOCK, dtype=np.int64)
        for source, count in enumerate(counts):
            before = period * int(self._per_period[source]) + int(self._before[row, source])
            ranks[sources == source] = before + np.arange(count)
        return sources, ranks


def _counts(quotas: Sequence[int]) -> NDArray[np.int64]:
    """Samples of each source in each block of a period, int64 [_PERIOD, sources]; every row sums to BLOCK.

    Systematic sampling: the sources' fractional shares lie end to end on a line. A comb of unit pitch gives one sample
    for each tooth in a share, so a share is rounded down or up. The comb's offset runs through all multiples of
    1 / _PERIOD in bit-reversed order, which spreads the roundings evenly.
    """
    shares = np.diff([0, *quotas])  # of a period
    whole, rest = shares // _PERIOD, shares % _PERIOD  # rest in 1 / _PERIOD samples a block
    line = np.concatenate([[0], np.cumsum(rest)])
    bits = _PERIOD.bit_length() - 1
    offsets = np.array([int(f"{row:0{bits}b}"[::-1], 2) for row in range(_PERIOD)])
    teeth = (line[None, :] + offsets[:, None]) // _PERIOD
    return whole[None, :] + np.diff(teeth, axis=1)
