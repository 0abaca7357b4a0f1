"""RMSNorm and the parameter-free LayerNorm of OLMo-1, alone and after a residual addition."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_same_device, check_same_dtype, check_shape
from arc_kernels._dispatch import use_triton
from arc_kernels._limits import MAX_NORM_WIDTH
from arc_kernels.norm.reference import (
    add_layer_norm_reference,
    add_rms_norm_reference,
    layer_norm_reference,
    rms_norm_reference,
)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019), in the dtype of x.

    x_TD: [..., D]. The Triton kernels read rows of any stride without a copy, up to D = 16384.
    weight_D: [D].

    Statistics are float32 (float64 for float64 input). Raises ValueError if shapes or devices do not fit.
    """
    _check_row(x_TD)
    _check_weight(x_TD, weight_D)
    if not _takes_kernel(x_TD):
        return rms_norm_reference(x_TD, weight_D, eps)
    from arc_kernels.norm.autograd import norm_triton

    return norm_triton(x_TD, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both in the dtype of x. Shapes and errors as in `rms_norm`.

    x and residual have the same dtype. The norm is computed from the returned sum, which is rounded to that dtype.
    """
    _check_sum(x_TD, residual_TD)
    _check_weight(x_TD, weight_D)
    if not _takes_kernel(x_TD):
        return add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)
    from arc_kernels.norm.autograd import add_norm_triton

    return add_norm_triton(x_TD, residual_TD, weight_D, eps)


def layer_norm(x_TD: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, without parameters (OLMo-1), in the dtype of x.

    Shapes and errors as in `rms_norm`.
    """
    _check_row(x_TD)
    if not _takes_kernel(x_TD):
        return layer_norm_reference(x_TD, eps)
    from arc_kernels.norm.autograd import norm_triton

    return norm_triton(x_TD, None, eps)


def add_layer_norm(x_TD: Tensor, residual_TD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), both in the dtype of x. See `add_rms_norm`."""
    _check_sum(x_TD, residual_TD)
    if not _takes_kernel(x_TD):
        return add_layer_norm_reference(x_TD, residual_TD, eps)
    from arc_kernels.norm.autograd import add_norm_triton

    return add_norm_triton(x_TD, residual_TD, None, eps)


def _check_weight(x_TD: Tensor, weight_D: Tensor) -> None:
    check_shape("weight_D", weight_D, (x_TD.shape[-1],))
    check_same_device(x_TD=x_TD, weight_D=weight_D)


def _check_sum(x_TD: Tensor, residual_TD: Tensor) -> None:
    _check_row(x_TD)
    check_shape("residual_TD", residual_TD, tuple(x_TD.shape))
    check_same_dtype(x_TD=x_TD, residual_TD=residual_TD)
    check_same_device(x_TD=x_TD, residual_TD=residual_TD)


def _check_row(x_TD: Tensor) -> None:
    if x_TD.dim() == 0 or not x_TD.is_floating_point():
        raise ValueError(f"x_TD is {x_TD.dtype} of shape {tuple(x_TD.shape)}; expected floats of shape [..., D]")


def _takes_kernel(x_TD: Tensor) -> bool:
    is_taken = use_triton(x_TD)
    if is_taken and not 1 <= x_TD.shape[-1] <= MAX_NORM_WIDTH:
        raise ValueError(
            f"x_TD has rows of {x_TD.shape[-1]}; the Triton kernels support 1 … {MAX_NORM_WIDTH}: use 'reference'"
        )
    return is_taken
