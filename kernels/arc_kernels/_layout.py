"""Convert tensors of any shape and strides to the layout of the kernels."""

from __future__ import annotations

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """Reshape [..., D] to [T, D] with contiguous rows. Copies only if the strides do not allow a view."""
    return unit_stride(x.flatten(0, -2) if x.dim() > 1 else x[None])


def contiguous(x: Tensor | None) -> Tensor | None:
    """`x` in contiguous memory; None stays None."""
    return None if x is None else x.contiguous()


def unit_stride(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if the stride of its last dimension is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
