"""SwiGLU (Shazeer 2020): the elementwise part of the feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_shape
from arc_kernels.swiglu.reference import swiglu_reference


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the dtype of the inputs. ValueError where the shapes differ."""
    check_shape("up_TF", up_TF, tuple(gate_TF.shape))
    return swiglu_reference(gate_TF, up_TF)


__all__ = ["swiglu", "swiglu_reference"]
