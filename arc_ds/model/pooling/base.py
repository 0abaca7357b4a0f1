"""The interface of pooling strategies, and the rows of a batch as a grid of contexts.

Shape letters: T rows, G groups, C contexts, L rows of the longest context, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

import arc_kernels as ak
from arc_ds.batch.groups import RuleKind
from arc_ds.batch.packing import PoolLevel
from arc_ds.model.backbone import Norm, Spans


class Pooling(ABC):
    """A pure function of the rows and the level's boundaries. By default it groups rows by content.

    The number of pooled rows of a context depends only on its length (`batch.groups.GroupRule`). The choice of rows may
    depend on their content. Gradients flow through the combined rows, not through the choice.

    contiguous: whether group g holds the rows group_cu[g] … group_cu[g + 1] - 1. Causal pooling needs it.
    rule_kind: the kind of rule that a pooling factor means.
    """

    contiguous: bool = False
    rule_kind: RuleKind = "factor"

    def pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        """Pool rows [T, D] to [G, D] in the dtype of x. `spans` delimit the contexts."""
        return self._pool(x_TD, spans, level) if x_TD.shape[0] else x_TD

    @abstractmethod
    def _pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        """`pool` for a batch with at least one row."""

    def pool_norm(self, x_TD: Tensor, spans: Spans, level: PoolLevel, norm: Norm) -> ak.PoolNorm:
        """Pooled rows, norm of the pooled rows, and norm of all rows."""
        pooled_GD = self.pool(x_TD, spans, level)
        return ak.PoolNorm(pooled_GD, norm(pooled_GD), norm(x_TD))


class ContextGrid(NamedTuple):
    """Packed rows as a grid [C, L] with one context per line.

    context_T: context of each row, int64.
    index_T: index of each row in its context, int64.
    num_rows_C: number of rows of each context.
    num_groups_C: number of groups of each context.
    first_group_C: index of the first group of each context.
    shape: (C, L).
    """

    context_T: Tensor
    index_T: Tensor
    num_rows_C: Tensor  # int64
    num_groups_C: Tensor  # int64
    first_group_C: Tensor  # int64
    shape: tuple[int, int]

    @staticmethod
    def of(num_rows: int, spans: Spans, level: PoolLevel) -> ContextGrid:
        """Build the grid of `num_rows` packed rows without a host sync."""
        cu, group_cu = spans.cu_seqlens_k.long(), level.cu_seqlens.long()
        num_contexts = cu.numel() - 1
        contexts_C = torch.arange(num_contexts, device=cu.device)
        context_T = torch.repeat_interleave(contexts_C, cu.diff(), output_size=num_rows)
        index_T = torch.arange(num_rows, device=cu.device) - cu[context_T]
        shape = (num_contexts, spans.max_seqlen_k)
        return ContextGrid(context_T, index_T, cu.diff(), group_cu.diff(), group_cu[:-1], shape)

    def spread(self, x_T: Tensor, fill: float = 0.0) -> Tensor:
        """Scatter packed rows [T, ...] to [C, L, ...]. Places without a row hold `fill`."""
        grid = x_T.new_full((*self.shape, *x_T.shape[1:]), fill)
        grid[self.context_T, self.index_T] = x_T
        return grid

    def gather(self, grid: Tensor) -> Tensor:
        """The inverse of `spread`: [C, L, ...] to [T, ...]."""
        return grid[self.context_T, self.index_T]


def weighted_groups(x_TD: Tensor, group_T: Tensor, weight_T: Tensor, num_groups: int) -> Tensor:
    """Sum of weight * row over the rows of each group: [G, D] in the dtype of x, accumulated at least in float32.

    group_T: group of each row, int64 [T] in 0 … G - 1.
    weight_T: weight of each row, float [T], constant for the gradient.
    """
    x = widen(x_TD)
    total_GD = x.new_zeros(num_groups, x.shape[1]).index_add(0, group_T, x * weight_T[:, None])
    return total_GD.to(x_TD.dtype)


def widen(x: Tensor) -> Tensor:
    """x in float32, or in float64 if x is float64."""
    return x if x.dtype == torch.float64 else x.float()
