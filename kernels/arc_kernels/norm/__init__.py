"""RMSNorm, alone and after a residual addition, and the parameter-free LayerNorm of OLMo-1."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_shape
from arc_kernels.norm.reference import add_rms_norm_reference, layer_norm_reference, rms_norm_reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019), in the dtype of x.

    x [..., D], weight [D]; statistics in float32 (float64 for float64 input). ValueError on shapes that do not fit.
    """
    check_shape("weight_D", weight_D, (x_TD.shape[-1],))
    return rms_norm_reference(x_TD, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both in the dtype of x. Shapes as in `rms_norm`."""
    check_shape("residual_TD", residual_TD, tuple(x_TD.shape))
    check_shape("weight_D", weight_D, (x_TD.shape[-1],))
    return add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)


def layer_norm(x_TD: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, without parameters (OLMo-1), in the dtype of x."""
    return layer_norm_reference(x_TD, eps)


__all__ = [
    "add_rms_norm",
    "add_rms_norm_reference",
    "layer_norm",
    "layer_norm_reference",
    "rms_norm",
    "rms_norm_reference",
]
