"""SwiGLU (Shazeer 2020): the elementwise part of the feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_same_device, check_same_dtype, check_shape
from arc_kernels._dispatch import use_triton
from arc_kernels.swiglu.reference import swiglu_reference


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the dtype of the inputs.

    gate_TF: [..., F], any row stride, such as one half of a fused projection.
    up_TF: same shape and dtype, any row stride.

    Raises ValueError if shapes, dtypes or devices differ.
    """
    if gate_TF.dim() == 0 or not gate_TF.is_floating_point():
        raise ValueError(f"gate_TF is {gate_TF.dtype} of shape {tuple(gate_TF.shape)}; expected floats [..., F]")
    check_shape("up_TF", up_TF, tuple(gate_TF.shape))
    check_same_dtype(gate_TF=gate_TF, up_TF=up_TF)
    check_same_device(gate_TF=gate_TF, up_TF=up_TF)
    if not use_triton(gate_TF):
        return swiglu_reference(gate_TF, up_TF)
    from arc_kernels.swiglu.autograd import swiglu_triton

    return swiglu_triton(gate_TF, up_TF)
