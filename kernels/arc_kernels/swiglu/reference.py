"""SwiGLU in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """See `swiglu`."""
    return F.silu(gate_TF) * up_TF
