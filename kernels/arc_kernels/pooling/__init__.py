"""Group pooling: reduce ragged groups of rows to one row each, and compute the norms of the pooled layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from arc_kernels._check import check_boundaries, check_same_device, check_shape
from arc_kernels._dispatch import use_triton
from arc_kernels._limits import MAX_POOL_WIDTH
from arc_kernels.pooling.reference import POOL_KINDS, group_pool_reference, pool_norm_reference


class PoolNorm(NamedTuple):
    """The inputs of a pooled layer: residual [G, D], input of the queries [G, D] and input of the keys [T, D]."""

    pooled_GD: Tensor
    normed_pooled_GD: Tensor
    normed_TD: Tensor


def group_pool(x_TD: Tensor, group_cu: Tensor, kind: str, num_groups: int) -> Tensor:
    """Reduce each group of consecutive rows to one row: [G, D] in the dtype of x, accumulated in float32.

    x_TD: rows [T, D].
    group_cu: boundaries of the groups, int32 [G + 1]; each group has at least one row.
    kind: "mean", "sum", "last" (row of the group), or "fusion": the mean rescaled to the largest L2 norm in the group.
        That norm is a constant for the gradient (ARC-Encoder paper, ablations).
    num_groups: G, known on the host.

    Raises ValueError on an unknown kind, inconsistent arguments, and rows that are too wide for the Triton kernel.
    """
    _check(x_TD, group_cu, kind, num_groups)
    if _takes_kernel(x_TD):
        from arc_kernels.pooling.autograd import GroupPoolFunction

        return GroupPoolFunction.apply(x_TD, group_cu, kind)
    return group_pool_reference(x_TD, group_cu, kind)


def pool_norm(
    x_TD: Tensor, group_cu: Tensor, kind: str, num_groups: int, *, weight_D: Tensor | None, eps: float
) -> PoolNorm:
    """Pooled residual, its norm and the norm of every row. Reads x once.

    weight_D: RMSNorm's weight [D], or None for the parameter-free LayerNorm.

    Other arguments as in `group_pool`.
    """
    _check(x_TD, group_cu, kind, num_groups)
    if weight_D is not None:
        check_shape("weight_D", weight_D, (x_TD.shape[-1],))
        check_same_device(x_TD=x_TD, weight_D=weight_D)
    if _takes_kernel(x_TD):
        from arc_kernels.pooling.autograd import PoolNormFunction

        return PoolNorm(*PoolNormFunction.apply(x_TD, group_cu, weight_D, kind, eps))
    return PoolNorm(*pool_norm_reference(x_TD, group_cu, kind, weight_D=weight_D, eps=eps))


def _check(x_TD: Tensor, group_cu: Tensor, kind: str, num_groups: int) -> None:
    check_shape("x_TD", x_TD, (None, None))
    check_same_device(x_TD=x_TD, group_cu=group_cu)
    check_shape("group_cu", group_cu, (num_groups + 1,))
    if num_groups == 0 and x_TD.shape[0] > 0:
        raise ValueError(f"group_cu has no group, but x_TD has {x_TD.shape[0]} rows; every row must be in a group")
    check_boundaries("group_cu", group_cu, total=x_TD.shape[0])
    if kind not in POOL_KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(POOL_KINDS)}")


def _takes_kernel(x_TD: Tensor) -> bool:
    is_taken = use_triton(x_TD)
    if is_taken and x_TD.shape[1] > MAX_POOL_WIDTH:
        raise ValueError(
            f"x_TD has {x_TD.shape[1]} columns; the Triton kernels support at most {MAX_POOL_WIDTH}: "
            "call under arc_kernels.use('reference')"
        )
    return is_taken
