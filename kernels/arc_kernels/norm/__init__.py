"""RMSNorm and the parameter-free LayerNorm of OLMo-1, alone and after a residual addition."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_same_device, check_same_dtype, check_shape
from arc_kernels._dispatch import use_triton
from arc_kernels._limits import MAX_NORM_WIDTH
from arc_kernels.norm.reference import layer_norm_reference, rms_norm_reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019), in the dtype of x.

    x_TD: [..., D]. The Triton kernels read rows of any stride without a copy, up to D = 16384.
    weight_D: [D].

    Statistics are float32 (float64 for float64 input). Raises ValueError if shapes or devices do not fit.
    """
    return _norm(x_TD, None, weight_D, eps)[0]


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both in the dtype of x. Shapes and errors as in `rms_norm`.

    x and residual have the same dtype. The norm is computed from the returned sum, which is rounded to that dtype.
    """
    return _norm(x_TD, residual_TD, weight_D, eps)


def layer_norm(x_TD: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, without parameters (OLMo-1), in the dtype of x.

    Shapes and errors as in `rms_norm`.
    """
    return _norm(x_TD, None, None, eps)[0]


def add_layer_norm(x_TD: Tensor, residual_TD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), both in the dtype of x. See `add_rms_norm`."""
    return _norm(x_TD, residual_TD, None, eps)


def _norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual): LayerNorm if the weight is None. Without a residual, use the norm only."""
    if x_TD.dim() == 0 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD is {x_TD.dtype} of shape {tuple(x_TD.shape)}; expected floats of shape [..., D]")
    if residual_TD is not None:
        check_shape("residual_TD", residual_TD, tuple(x_TD.shape))
        check_same_dtype(x_TD=x_TD, residual_TD=residual_TD)
    if weight_D is not None:
        check_shape("weight_D", weight_D, (x_TD.shape[-1],))
    check_same_device(x_TD=x_TD, residual_TD=residual_TD, weight_D=weight_D)
    if use_triton(x_TD):
        from arc_kernels.norm.autograd import norm_triton

        if not 1 <= x_TD.shape[-1] <= MAX_NORM_WIDTH:
            raise ValueError(
                f"x_TD has rows of {x_TD.shape[-1]}; the Triton kernels support 1 … {MAX_NORM_WIDTH}: use 'reference'"
            )
        return norm_triton(x_TD, residual_TD, weight_D, eps)
    total_TD = x_TD if residual_TD is None else x_TD + residual_TD
    if weight_D is None:
        return layer_norm_reference(total_TD, eps), total_TD
    return rms_norm_reference(total_TD, weight_D, eps), total_TD
