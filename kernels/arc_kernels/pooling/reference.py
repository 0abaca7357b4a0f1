"""Group pooling in plain torch. Shape letters: T rows, G groups, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from arc_kernels.norm.reference import layer_norm_reference, rms_norm_reference

POOL_KINDS = ("mean", "last", "sum", "fusion")


def group_pool_reference(x_TD: Tensor, group_cu: Tensor, kind: str) -> Tensor:
    """See `group_pool`."""
    cu = group_cu.long()
    if kind == "last":
        return x_TD[cu[1:] - 1]
    x = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    sizes_G = cu[1:] - cu[:-1]
    num_groups = sizes_G.numel()
    group_T = torch.repeat_interleave(torch.arange(num_groups, device=cu.device), sizes_G, output_size=x_TD.shape[0])
    total_GD = x.new_zeros(num_groups, x.shape[1]).index_add(0, group_T, x)
    if kind == "sum":
        return total_GD.to(x_TD.dtype)
    mean_GD = total_GD / sizes_G[:, None]
    if kind == "fusion":
        norms_T = x.detach().norm(dim=-1)
        largest_G = norms_T.new_zeros(num_groups).scatter_reduce(0, group_T, norms_T, "amax")
        mean_GD = mean_GD / mean_GD.norm(dim=-1, keepdim=True) * largest_G[:, None]
    return mean_GD.to(x_TD.dtype)


def pool_norm_reference(
    x_TD: Tensor, group_cu: Tensor, kind: str, *, weight_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pool_norm`."""
    pooled_GD = group_pool_reference(x_TD, group_cu, kind)
    if weight_D is None:
        return pooled_GD, layer_norm_reference(pooled_GD, eps), layer_norm_reference(x_TD, eps)
    return pooled_GD, rms_norm_reference(pooled_GD, weight_D, eps), rms_norm_reference(x_TD, weight_D, eps)
