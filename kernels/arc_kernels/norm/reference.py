"""The norms in plain torch: statistics in float32 (float64 for float64 input)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `rms_norm`."""
    x = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TD.dtype) * weight_D.to(x_TD.dtype)


def layer_norm_reference(x_TD: Tensor, eps: float) -> Tensor:
    """See `layer_norm`."""
    x = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    return F.layer_norm(x, x.shape[-1:], eps=eps).to(x_TD.dtype)
