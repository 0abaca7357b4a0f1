"""Pooling of consecutive rows in groups that depend only on lengths (paper, section 3 and ablations)."""

from __future__ import annotations

from torch import Tensor

import arc_kernels as ak
from arc_ds.batch.packing import PoolLevel
from arc_ds.model.backbone import Norm, Spans


class GroupPooling:
    """Reduce consecutive rows to their mean, sum, last row, or mean rescaled to the group's largest norm ("fusion")."""

    contiguous = True

    def __init__(self, kind: str) -> None:
        if kind not in ak.POOL_KINDS:
            raise ValueError(f"pooling kind is {kind!r}; expected one of {', '.join(ak.POOL_KINDS)}")
        self.kind = kind

    def pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        """See `arc_kernels.group_pool`."""
        del spans
        return ak.group_pool(x_TD, level.group_cu, self.kind, level.positions.numel())

    def pool_norm(self, x_TD: Tensor, spans: Spans, level: PoolLevel, norm: Norm) -> ak.PoolNorm:
        """See `arc_kernels.pool_norm`."""
        del spans
        return ak.pool_norm(
            x_TD, level.group_cu, self.kind, level.positions.numel(), weight_D=norm.weight, eps=norm.eps
        )
