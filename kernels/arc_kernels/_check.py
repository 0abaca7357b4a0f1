"""Checks of arguments that several kernels share; each raises a ValueError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """`x` has the given shape; None stands for any size."""
    fits = x.dim() == len(shape) and all(want is None or want == got for want, got in zip(shape, x.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({wanted})")


def check_same_device(**tensors: Tensor | None) -> None:
    """All given tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors are on different devices: {devices}; move them to one")


def check_boundaries(name: str, cu: Tensor) -> None:
    """`cu` is an int32 vector of boundaries with at least one segment. (Its values are on the device: not read.)"""
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{name} is {cu.dtype} of shape {tuple(cu.shape)}; expected int32 boundaries of shape [S + 1]")
