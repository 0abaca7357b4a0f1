"""Pooling strategies: reduce the rows of a context to one row per group (paper, section 3 and ablations).

Names:

    mean, last, sum, fusion                       consecutive rows in balanced groups (`GroupPooling`)
    kmeans, kmeans_METRIC                         means of clusters; METRIC: euclidean (default) or cosine
    similarity, similarity_METRIC                 merge the most similar neighbours in each round; METRIC: cosine
                                                  (default), dot, euclidean, manhattan or chebyshev
    prune, prune_METRIC                           like similarity, but keep the later row of a pair, not the mean
    prune_norm                                    keep the rows with the largest norms
"""

from __future__ import annotations

from collections.abc import Sequence

import arc_kernels as ak
from arc_ds.batch.groups import GroupRule
from arc_ds.model.pooling.base import ContentPooling, Pooling
from arc_ds.model.pooling.clustering import KMEANS_METRICS, KMeansPooling
from arc_ds.model.pooling.consecutive import GroupPooling
from arc_ds.model.pooling.merging import SIMILARITIES, MergePooling, NormPruning

_NEIGHBOUR_KINDS = ("similarity", "prune")

STRATEGIES: tuple[str, ...] = (
    *ak.POOL_KINDS,
    *("kmeans", *(f"kmeans_{metric}" for metric in KMEANS_METRICS)),
    *_NEIGHBOUR_KINDS,
    *(f"{kind}_{metric}" for kind in _NEIGHBOUR_KINDS for metric in SIMILARITIES),
    "prune_norm",
)


def make_strategy(name: str) -> Pooling:
    """Build the strategy with a name from `STRATEGIES`. Raises ValueError on any other name."""
    _check_name(name)
    if name in ak.POOL_KINDS:
        return GroupPooling(name)
    if name == "prune_norm":
        return NormPruning()
    kind, _, metric = name.partition("_")
    if kind == "kmeans":
        return KMeansPooling(metric or "euclidean")
    return MergePooling(metric or "cosine", prune=kind == "prune")


def group_rules(strategy: str, factors: Sequence[int], num_groups: int | None = None) -> tuple[GroupRule, ...]:
    """One rule per pooled layer that gives the number of rows of a context after pooling.

    strategy: name of the pooling strategy.
    factors: rows per group in each pooled layer, ≥ 1.
    num_groups: fixed number of groups in the last layer, ≥ 1; instead of `factors`.

    A context of n rows is pooled to ceil(n / factor) groups. Merging and pruning keep n // factor rows, or all n if
    n < factor, as in the reference. Raises ValueError on a number below 1, or if both or neither are given.
    """
    _check_name(strategy)
    if bool(factors) == (num_groups is not None):
        raise ValueError(f"expected either factors or num_groups; got {list(factors)} and {num_groups}")
    for value in (*factors, *(() if num_groups is None else (num_groups,))):
        if value < 1:
            raise ValueError(f"a pooling factor or number of groups is {value}; expected at least 1")
    if num_groups is not None:
        return (GroupRule("count", num_groups),)
    kind = strategy.partition("_")[0]
    return tuple(GroupRule("floor_factor" if kind in _NEIGHBOUR_KINDS else "factor", factor) for factor in factors)


def _check_name(name: str) -> None:
    if name not in STRATEGIES:
        raise ValueError(f"pooling strategy is {name!r}; expected one of {', '.join(STRATEGIES)}")


__all__ = [
    "STRATEGIES",
    "ContentPooling",
    "GroupPooling",
    "KMeansPooling",
    "MergePooling",
    "NormPruning",
    "Pooling",
    "group_rules",
    "make_strategy",
]
