"""Argument checks for several kernels. Each raises a ValueError that names the argument."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor


def check_shape(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Check that `x` has the given shape. None matches any size."""
    fits = x.dim() == len(shape) and all(want is None or want == got for want, got in zip(shape, x.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({wanted})")


def check_same_device(**tensors: Tensor | None) -> None:
    """Check that all given tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors are on different devices: {devices}; move them to one")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Check that all given tensors have one dtype."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"tensors differ in dtype: {dtypes}; convert them to one")


def check_boundaries(name: str, cu: Tensor, *, total: int | None) -> None:
    """Check the boundaries `cu` of segments: int32 [S + 1], from 0 to `total` rows, at least one row per segment.

    Values are checked only if `values_are_readable`. The last value is not checked if `total` is None (unknown).
    """
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{name} is {cu.dtype} of shape {tuple(cu.shape)}; expected int32 boundaries of shape [S + 1]")
    if not values_are_readable(cu):
        return
    values = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} starts at {values[0]}; expected 0")
    if total is not None and values[-1] != total:
        raise ValueError(f"{name} ends at {values[-1]}; expected the number of rows, {total}")
    for i, (start, end) in enumerate(pairwise(values)):
        if end <= start:
            kind = "is empty" if end == start else "decreases"
            raise ValueError(f"{name} {kind} at segment {i}: from {start} to {end}; every segment needs a row")


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """Check that `indices` is int64 and, if values can be read, that each is in 0 … size - 1."""
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} is {indices.dtype}; expected int64")
    if values_are_readable(indices) and indices.numel() > 0:
        low, high = (int(x) for x in indices.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name} holds {low if low < 0 else high}; expected 0 … {size - 1}")


def check_angles(angles: Mapping[str, Tensor], x_TNH: Tensor, *, has_gradient: bool) -> None:
    """Check cosines and sines of rotary angles.

    angles: by name, float32 or float64 [T, H / 2], on the device of x.
    x_TNH: the rows to rotate, [T, N, H] with even H.
    has_gradient: whether the angles may require a gradient.
    """
    num_rows, _, head_dim = x_TNH.shape
    if head_dim % 2:
        raise ValueError(f"the head size is {head_dim}; expected an even one: rotary rotates pairs (i, i + H / 2)")
    for name, angle in angles.items():
        check_shape(name, angle, (num_rows, head_dim // 2))
        if angle.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {angle.dtype}; expected float32: coarser angles rotate distant positions wrongly"
            )
        if angle.requires_grad and not has_gradient:
            raise ValueError(
                f"{name} requires a gradient, but the kernel has none; detach it, or call under "
                "arc_kernels.use('reference')"
            )
    check_same_device(x=x_TNH, **angles)


def values_are_readable(x: Tensor) -> bool:
    """Whether to check values.

    On a GPU only under ARC_KERNELS_CHECK=1, because it synchronises. On the CPU unless ARC_KERNELS_CHECK=0. Never while
    torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return False
    choice = os.environ.get("ARC_KERNELS_CHECK")
    return choice == "1" or (choice != "0" and x.device.type == "cpu")
