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

from collections.abc import Mapping, Sequence

import arc_kernels as ak
from arc_ds.batch.groups import GroupRule
from arc_ds.model.pooling.base import Pooling
from arc_ds.model.pooling.clustering import KMEANS_METRICS, KMeansPooling
from arc_ds.model.pooling.consecutive import GroupPooling
from arc_ds.model.pooling.merging import SIMILARITIES, MergePooling, NormPruning

STRATEGIES: Mapping[str, Pooling] = {
    **{kind: GroupPooling(kind) for kind in ak.POOL_KINDS},
    "kmeans": KMeansPooling("euclidean"),
    **{f"kmeans_{metric}": KMeansPooling(metric) for metric in KMEANS_METRICS},
    "similarity": MergePooling("cosine"),
    "prune": MergePooling("cosine", prune=True),
    **{f"similarity_{metric}": MergePooling(metric) for metric in SIMILARITIES},
    **{f"prune_{metric}": MergePooling(metric, prune=True) for metric in SIMILARITIES},
    "prune_norm": NormPruning(),
}


def get_strategy(name: str) -> Pooling:
    """The strategy with a name from `STRATEGIES`. Raises ValueError on any other name."""
    if name not in STRATEGIES:
        raise ValueError(f"pooling strategy is {name!r}; expected one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def group_rules(strategy: str, factors: Sequence[int], num_groups: int | None = None) -> tuple[GroupRule, ...]:
    """One rule per pooled layer that gives the number of rows of a context after pooling.

    strategy: name of the pooling strategy.
    factors: rows per group in each pooled layer, ≥ 1.
    num_groups: fixed number of groups in the last layer, ≥ 1; instead of `factors`.

    A context of n rows is pooled to ceil(n / factor) groups. Merging and pruning keep n // factor rows, or all n if
    n < factor, as in the reference. Raises ValueError on an unknown strategy.
    """
    if num_groups is not None:
        return (GroupRule("count", num_groups),)
    return tuple(GroupRule(get_strategy(strategy).rule_kind, factor) for factor in factors)


__all__ = ["STRATEGIES", "GroupPooling", "KMeansPooling", "Pooling", "get_strategy", "group_rules"]
