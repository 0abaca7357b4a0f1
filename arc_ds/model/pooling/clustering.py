"""k-means pooling: replace the rows of a context by the means of its clusters (paper, ablations).

Shape letters: T rows, C contexts, L rows of the longest context, M most groups of a context, G groups, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import arc_kernels as ak
from arc_ds.batch.packing import PoolLevel
from arc_ds.model.backbone import Spans
from arc_ds.model.pooling.base import ContextGrid, Pooling, weighted_groups, widen

KMEANS_METRICS = ("euclidean", "cosine")
_NUM_ROUNDS = 10  # updates of the centres


class KMeansPooling(Pooling):
    """Lloyd's algorithm within each context, started from the means of its balanced groups.

    This start makes the result deterministic and orders the clusters like the groups. A cluster that loses all its rows
    keeps its centre while the others move, and its result is the mean of its balanced group. The number of pooled rows
    therefore depends only on the context's length. Gradients flow through the means, not through the assignment.

    metric: "euclidean", or "cosine" (rows and centres are normalised to length one).
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def _pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        num_groups = level.positions.numel()
        balanced_GD = ak.group_pool(x_TD, level.group_cu, "mean", num_groups)
        with torch.no_grad():
            cluster_T = self._clusters(widen(x_TD), widen(balanced_GD), spans, level)
            sizes_G = _sizes(cluster_T, num_groups, widen(x_TD).dtype)
        means_GD = weighted_groups(x_TD, cluster_T, 1.0 / sizes_G[cluster_T], num_groups)
        return torch.where(sizes_G[:, None] > 0, means_GD, balanced_GD)

    def _clusters(self, x_TD: Tensor, centres_GD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        """The cluster of each row after the last round: int64 [T] in 0 … G - 1."""
        x_TD, centres_GD = self._features(x_TD), self._features(centres_GD)
        grid = ContextGrid.of(x_TD.shape[0], spans, level)
        num_groups = level.positions.numel()
        cluster_T = self._nearest(x_TD, centres_GD, grid, level)
        for _ in range(_NUM_ROUNDS):
            sizes_G = _sizes(cluster_T, num_groups, x_TD.dtype)
            means_GD = torch.zeros_like(centres_GD).index_add(0, cluster_T, x_TD) / sizes_G.clamp(min=1.0)[:, None]
            centres_GD = torch.where(sizes_G[:, None] > 0, self._features(means_GD), centres_GD)
            cluster_T = self._nearest(x_TD, centres_GD, grid, level)
        return cluster_T

    def _nearest(self, x_TD: Tensor, centres_GD: Tensor, grid: ContextGrid, level: PoolLevel) -> Tensor:
        """The nearest centre in its own context for each row, int64 [T]. The first one wins a tie."""
        num_contexts, _ = grid.shape
        contexts_C = torch.arange(num_contexts, device=x_TD.device)
        context_G = torch.repeat_interleave(contexts_C, grid.num_groups_C, output_size=level.positions.numel())
        centres_CMD = centres_GD.new_zeros(num_contexts, level.max_seqlen, centres_GD.shape[1])
        centres_CMD[context_G, level.positions] = centres_GD
        # x·c - |c|²/2 ranks centres like -|x - c|².
        closeness_CLM = grid.spread(x_TD) @ centres_CMD.mT - centres_CMD.square().sum(-1)[:, None, :] / 2
        missing_CM = torch.arange(level.max_seqlen, device=x_TD.device) >= grid.num_groups_C[:, None]
        nearest_CL = closeness_CLM.masked_fill(missing_CM[:, None, :], float("-inf")).argmax(dim=2)
        return grid.gather(nearest_CL + grid.first_group_C[:, None])

    def _features(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.metric == "cosine" else x


def _sizes(cluster_T: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """Number of rows of each cluster, as floats [G]."""
    ones_T = torch.ones(cluster_T.shape[0], dtype=dtype, device=cluster_T.device)
    return ones_T.new_zeros(num_groups).index_add(0, cluster_T, ones_T)
