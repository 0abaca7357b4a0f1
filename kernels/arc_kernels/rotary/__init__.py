"""Rotary position embedding (Su et al. 2021), pairs (i, i + H / 2)."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_angles, check_shape
from arc_kernels._dispatch import use_triton
from arc_kernels.rotary.reference import rotary_reference

MAX_HEAD_DIM = 512  # limit of the Triton kernel


def rotary(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H / 2) of each head by the angles of its row: [T, N, H] in the dtype of x.

    x_TNH: [T, N, H], possibly a view into a fused projection: the kernel accepts any row and head strides.
    cos_TF: cosines of position times frequency, float32 or float64 [T, H / 2].
    sin_TF: sines of position times frequency, float32 or float64 [T, H / 2].

    Both may have a common factor, as yarn and longrope scale them. A pair with cosine 1 and sine 0 stays as it is.

    The Triton kernel computes no gradient of the angles. Raises ValueError on an odd H, or if shapes, dtypes or devices
    do not fit.
    """
    check_shape("x_TNH", x_TNH, (None, None, None))
    if x_TNH.shape[-1] % 2 or not x_TNH.is_floating_point():
        raise ValueError(f"x_TNH is {x_TNH.dtype} with head size {x_TNH.shape[-1]}; expected floats and an even size")
    triton = use_triton(x_TNH)
    check_angles({"cos_TF": cos_TF, "sin_TF": sin_TF}, x_TNH, has_gradient=not triton)
    if not triton:
        return rotary_reference(x_TNH, cos_TF, sin_TF)
    from arc_kernels.rotary.autograd import RotaryFunction

    if x_TNH.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"x_TNH has head size {x_TNH.shape[-1]}; the kernel supports {MAX_HEAD_DIM}: use 'reference'")
    return RotaryFunction.apply(x_TNH, cos_TF.contiguous(), sin_TF.contiguous())
