"""Linear cross-entropy: the NLL of labelled rows with a frozen head, without storing the logits."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_indices, check_same_device, check_same_dtype, check_shape
from arc_kernels._dispatch import use_triton
from arc_kernels.cross_entropy.reference import linear_cross_entropy_reference


def linear_cross_entropy(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """-log softmax(h @ weight.T)[label] of each row: float32 [L] (float64 for float64 input).

    h_LD: rows [L, D].
    weight_VD: the head [V, D], frozen: it gets no gradient.
    labels_L: int64 [L] in 0 … V - 1.

    The forward pass computes the gradient of h chunk by chunk, so backward needs neither logits nor the weight. Logits
    and loss are rounded to the dtype of h; in bfloat16, a logit of size a is rounded by up to a / 512. Sums are
    float32.

    Raises ValueError if shapes, dtypes or devices do not fit, the weight requires a gradient, the vocabulary is empty,
    or a label is outside the vocabulary. Labels on a GPU are read only under ARC_KERNELS_CHECK=1; otherwise an invalid
    label gives a NaN loss.
    """
    check_shape("h_LD", h_LD, (None, None))
    check_shape("weight_VD", weight_VD, (None, h_LD.shape[-1]))
    if weight_VD.shape[0] == 0:
        raise ValueError("weight_VD has no rows; expected the head of a vocabulary of at least one token")
    check_shape("labels_L", labels_L, (h_LD.shape[0],))
    check_same_device(h_LD=h_LD, weight_VD=weight_VD, labels_L=labels_L)
    check_same_dtype(h_LD=h_LD, weight_VD=weight_VD)
    if weight_VD.requires_grad:
        raise ValueError("weight_VD requires a gradient; linear_cross_entropy is for a frozen head")
    check_indices("labels_L", labels_L, weight_VD.shape[0])
    if use_triton(h_LD):
        from arc_kernels.cross_entropy.autograd import linear_cross_entropy_triton

        return linear_cross_entropy_triton(h_LD, weight_VD, labels_L)
    return linear_cross_entropy_reference(h_LD, weight_VD, labels_L)
