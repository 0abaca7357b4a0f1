"""Pooling of consecutive rows in groups that depend only on lengths (paper, section 3 and ablations)."""

from __future__ import annotations

from torch import Tensor

import arc_kernels as ak
from arc_ds.batch.packing import PoolLevel
from arc_ds.model.backbone import Norm, Spans
from arc_ds.model.pooling.base import Pooling


class GroupPooling(Pooling):
    """Reduce consecutive rows to their mean, sum, last row, or mean rescaled to the group's largest norm ("fusion").

    kind: one of `arc_kernels.POOL_KINDS`; see `arc_kernels.group_pool` and `pool_norm`.
    """

    contiguous = True

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def _pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        return ak.group_pool(x_TD, level.group_cu, self.kind, level.positions.numel())

    def pool_norm(self, x_TD: Tensor, spans: Spans, level: PoolLevel, norm: Norm) -> ak.PoolNorm:
        return ak.pool_norm(
            x_TD, level.group_cu, self.kind, level.positions.numel(), weight_D=norm.weight, eps=norm.eps
        )
