"""Pooling strategies: how the rows of a context become one row a group (design 5; paper, section 3 and ablations).

A strategy is a pure function of the rows and the level's boundaries. How many rows a context leaves follows from its
length alone (`data.groups.GroupRule`); which rows merge may follow from their content.
Shape letters: T rows, G groups, D width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

import arc_kernels as ak
from arc_ds.data.packing import PoolLevel
from arc_ds.model.backbone import Norm


class Pooling(Protocol):
    """What a pooled layer asks of a strategy."""

    contiguous: bool  # whether group g holds the rows group_cu[g] … group_cu[g + 1] - 1 (causal pooling needs it)

    def pool(self, x_TD: Tensor, cu_seqlens: Tensor, level: PoolLevel) -> Tensor:
        """Pooled rows [G, D] of rows [T, D]; `cu_seqlens` int32 [C + 1], the contexts among the rows."""
        ...

    def pool_norm(self, x_TD: Tensor, cu_seqlens: Tensor, level: PoolLevel, norm: Norm) -> ak.PoolNorm:
        """Pooled rows, their norm, and the norm of all rows."""
        ...


class GroupPooling:
    """Consecutive rows to their mean, sum, last row, or mean at the group's largest norm ("fusion")."""

    contiguous = True

    def __init__(self, kind: str) -> None:
        if kind not in ak.POOL_KINDS:
            raise ValueError(f"pooling kind is {kind!r}; expected one of {', '.join(ak.POOL_KINDS)}")
        self.kind = kind

    def pool(self, x_TD: Tensor, cu_seqlens: Tensor, level: PoolLevel) -> Tensor:
        """See `arc_kernels.group_pool`."""
        return ak.group_pool(x_TD, level.group_cu, self.kind, level.positions.numel())

    def pool_norm(self, x_TD: Tensor, cu_seqlens: Tensor, level: PoolLevel, norm: Norm) -> ak.PoolNorm:
        """See `arc_kernels.pool_norm`."""
        return ak.pool_norm(
            x_TD, level.group_cu, self.kind, level.positions.numel(), weight_D=norm.weight, eps=norm.eps
        )
