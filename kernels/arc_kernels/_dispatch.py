"""Which implementation a call takes: the Triton kernels or plain torch. Decided at call time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Choice = Literal["auto", "triton", "reference"]
CHOICES: tuple[Choice, ...] = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CUDA_CAPABILITY = (8, 0)  # bfloat16 in tl.dot and asynchronous copies begin with Ampere

# Not a ContextVar: autograd runs backward, and with it the recomputation of a checkpointed block, on threads of its
# own, which would not see the caller's context and would save other tensors than the first pass did.
_forced: Choice | None = None


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Within the context every function takes the given implementation, on all threads.

    "auto": Triton on a supported GPU (CUDA from sm_80 on, or ROCm), plain torch elsewhere; "triton"; "reference".
    Outside any context the environment's ARC_KERNELS decides ("auto" where it is unset). Forward and backward of one
    graph belong in one context. A compiled function follows a change of context; it keeps what the environment said
    when it was traced. ValueError on any other choice.
    """
    global _forced
    before, _forced = _forced, _checked(choice, "choice")
    try:
        yield
    finally:
        _forced = before


def choice_in_force() -> Choice:
    """The context's choice, else the environment's. ValueError where ARC_KERNELS is none."""
    return _forced or _checked(os.environ.get("ARC_KERNELS") or "auto", "ARC_KERNELS")


def use_triton(x: Tensor) -> bool:
    """Whether a call on `x` takes the Triton kernels.

    Under "triton" a ValueError where they cannot run: float64 or integers, or a CPU tensor without TRITON_INTERPRET=1.
    A tensor on "meta" takes them under "triton": their operators then only compute shapes.
    """
    choice = choice_in_force()
    if choice == "reference":
        return False
    if choice == "auto":
        return x.is_cuda and x.dtype in KERNEL_DTYPES and _gpu_is_supported(x.device.index)
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"Triton kernels take float32, float16 and bfloat16, not {x.dtype}; use 'auto' or 'reference'")
    if not (x.is_cuda or x.is_meta or _cpu_tensors_are_taken()):
        raise ValueError(
            f"Triton kernels were asked for, but the tensor is on {x.device}; move it to a GPU, use 'auto' or "
            "'reference', or set TRITON_INTERPRET=1 before triton is imported (slow: for tests)"
        )
    return True


def demand_triton(x: Tensor) -> None:
    """ValueError where the kernels cannot run on `x`, whatever the choice in force is."""
    with use("triton"):
        use_triton(x)


def warp_size() -> int:
    """Lanes of a warp: 64 on AMD's server GPUs, 32 elsewhere (and under the interpreter, which has none)."""
    return 64 if torch.version.hip is not None else 32


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 under the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _checked(choice: str, name: str) -> Choice:
    for known in CHOICES:
        if choice == known:
            return known
    raise ValueError(f"{name} is {choice!r}; expected one of {', '.join(CHOICES)}")


def _cpu_tensors_are_taken() -> bool:
    """Whether Triton takes CPU tensors: under its interpreter. benchmarks/dry_launch.py replaces this function."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gpu_is_supported(index: int) -> bool:
    # Written for torch.compile too, which folds get_device_properties but not get_device_capability, and looks through
    # caches: so the cheap question comes first.
    if "triton" not in sys.modules and find_spec("triton") is None:
        return False
    properties = torch.cuda.get_device_properties(index)
    return torch.version.hip is not None or (properties.major, properties.minor) >= MIN_CUDA_CAPABILITY
