"""Rotary position embedding (Su et al. 2021), pairs (i, i + H / 2)."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_shape
from arc_kernels.rotary.reference import rotary_reference


def rotary(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates the pairs (i, i + H / 2) of each head by the angle of its row: [T, N, H], the dtype of x.

    cos_TF, sin_TF: float32 [T, H / 2], of position times frequency. ValueError on an odd H or shapes that do not fit.
    """
    if x_TNH.shape[-1] % 2:
        raise ValueError(f"x_TNH has head size {x_TNH.shape[-1]}; rotary pairs need an even one")
    check_shape("cos_TF", cos_TF, (x_TNH.shape[0], x_TNH.shape[-1] // 2))
    check_shape("sin_TF", sin_TF, tuple(cos_TF.shape))
    return rotary_reference(x_TNH, cos_TF, sin_TF)


__all__ = ["rotary", "rotary_reference"]
