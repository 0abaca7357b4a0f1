"""Rotary embedding in plain torch, in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x_TNH: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """See `rotary`."""
    x = x_TNH if x_TNH.dtype == torch.float64 else x_TNH.float()
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos_TF[:, None, :], sin_TF[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TNH.dtype)
