"""Pooling strategies: how the rows of a context become one row a group (design 5; paper, section 3 and ablations).

By name:

    mean, last, sum, fusion                       consecutive rows in balanced groups (`GroupPooling`)
    kmeans, kmeans_METRIC                         means of clusters; METRIC euclidean (default) or cosine
    similarity, similarity_METRIC                 the most similar neighbours merge, round by round; METRIC cosine
                                                  (default), dot, euclidean, manhattan or chebyshev
    prune, prune_METRIC                           the same, but the later of the two stays in place of their mean
    prune_norm                                    the rows of largest norm stay
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
    """The strategy of one of the names in `STRATEGIES`. ValueError on any other."""
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
    """One rule for each of the last layers: how many rows a context leaves there under the strategy.

    factors: rows per group of each pooled layer, ≥ 1; num_groups: instead, a fixed number of groups, ≥ 1, in the last
    layer. A context of n rows leaves ceil(n / factor) groups; merging and pruning leave n // factor rows, or all n
    where n < factor, as in the reference. ValueError on a number below 1, or where both or none are given.
    """
    _check_name(strategy)
    if bool(factors) == (num_groups is not None):
        raise ValueError(f"expected factors or num_groups, one of the two; got {list(factors)} and {num_groups}")
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
