"""Checks of tensors of indices; as in `_check`, each raises a ValueError that names the argument."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """`indices` is int64; where values can be read, each is in 0 … size - 1."""
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} is {indices.dtype}; expected int64")
    if values_are_readable(indices) and indices.numel() > 0:
        low, high = (int(x) for x in indices.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name} holds {low if low < 0 else high}; expected 0 … {size - 1}")


def values_are_readable(x: Tensor) -> bool:
    """Whether to look at the values: on a GPU, where it synchronises, only under ARC_KERNELS_CHECK=1; on the CPU unless
    it is 0; never while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return False
    choice = os.environ.get("ARC_KERNELS_CHECK")
    return choice == "1" or (choice != "0" and x.device.type == "cpu")
