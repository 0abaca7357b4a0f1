"""Linear cross-entropy: the NLL of labelled rows against a frozen head, without keeping the logits."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_same_device, check_shape
from arc_kernels.cross_entropy.reference import linear_cross_entropy_reference


def linear_cross_entropy(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """-log softmax(h @ weight.T)[label] of each row: float32 [L] (float64 for float64 input).

    h [L, D], weight [V, D] (frozen: it gets no gradient), labels int64 [L] in 0 … V - 1. The gradient of h is made in
    the forward pass, chunk by chunk, so neither logits nor the weight are kept for backward.
    Raises ValueError where shapes do not fit or the weight wants a gradient.
    """
    check_shape("weight_VD", weight_VD, (None, h_LD.shape[-1]))
    check_shape("labels_L", labels_L, (h_LD.shape[0],))
    check_same_device(h_LD=h_LD, weight_VD=weight_VD, labels_L=labels_L)
    if weight_VD.requires_grad:
        raise ValueError("weight_VD requires a gradient; linear_cross_entropy is for a frozen head")
    return linear_cross_entropy_reference(h_LD, weight_VD, labels_L)


__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
