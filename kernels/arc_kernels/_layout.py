"""How tensors of any number of dimensions and any strides become what the kernels take."""

from __future__ import annotations

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[..., D] as [T, D] with columns next to each other; a copy only where the strides forbid a view."""
    return unit_stride(x.flatten(0, -2) if x.dim() > 1 else x[None])


def unit_stride(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy where the elements of its last dimension are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()
