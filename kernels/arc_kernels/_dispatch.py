"""The choice between Triton kernels and plain torch, made at every call."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import Tensor

Choice = Literal["auto", "triton", "reference"]
CHOICES: tuple[Choice, ...] = ("auto", "triton", "reference")
_Choice = TypeVar("_Choice", bound=str)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CUDA_CAPABILITY = (8, 0)  # Ampere introduced bfloat16 in tl.dot and asynchronous copies

# Not a ContextVar: autograd runs backward on its own threads, and with it the recomputation of checkpointed blocks.
# These threads would not see the caller's context and would save other tensors than the first pass.
_forced: Choice | None = None


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Context in which every function uses the given implementation, on all threads.

    choice: "auto" (Triton on a supported GPU, i.e. CUDA from sm_80 on or ROCm, and plain torch elsewhere), "triton" or
        "reference".

    Outside any context the environment variable ARC_KERNELS decides (default "auto"). Forward and backward of one graph
    must run in the same context. A compiled function follows a change of context, but keeps the value of the
    environment variable from its tracing. Raises ValueError on any other choice.
    """
    global _forced
    before, _forced = _forced, checked(choice, "choice", CHOICES)
    try:
        yield
    finally:
        _forced = before


def choice_in_force() -> Choice:
    """The choice of the context, or else of the environment. Raises ValueError if ARC_KERNELS is invalid."""
    return _forced or checked(os.environ.get("ARC_KERNELS") or "auto", "ARC_KERNELS", CHOICES)


def use_triton(x: Tensor) -> bool:
    """Whether a call on `x` uses the Triton kernels.

    Under "triton", raises ValueError if they cannot run: for float64 and integers, or for a CPU tensor without
    TRITON_INTERPRET=1. A tensor on "meta" uses the kernels' operators under "triton"; they only compute shapes.
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
            f"Triton kernels were requested, but the tensor is on {x.device}; move it to a GPU, use 'auto' or "
            "'reference', or set TRITON_INTERPRET=1 before triton is imported (slow: for tests)"
        )
    return True


def demand_triton(x: Tensor) -> None:
    """Raise ValueError if the kernels cannot run on `x`, independent of the current choice."""
    with use("triton"):
        use_triton(x)


def warp_size() -> int:
    """Lanes of a warp: 64 on AMD's server GPUs, 32 elsewhere, including the interpreter."""
    return 64 if torch.version.hip is not None else 32


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 under the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def checked(choice: str, name: str, choices: tuple[_Choice, ...]) -> _Choice:
    """`choice` as one of the choices. Raises ValueError on any other; `name` is what holds it."""
    for known in choices:
        if choice == known:
            return known
    raise ValueError(f"{name} is {choice!r}; expected one of {', '.join(choices)}")


def _cpu_tensors_are_taken() -> bool:
    """Whether Triton accepts CPU tensors, as its interpreter does. benchmarks/dry_launch.py replaces this function."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gpu_is_supported(index: int) -> bool:
    # torch.compile can fold get_device_properties but not get_device_capability, and it traces through caches. The
    # cheap check therefore comes first.
    if "triton" not in sys.modules and find_spec("triton") is None:
        return False
    properties = torch.cuda.get_device_properties(index)
    return torch.version.hip is not None or (properties.major, properties.minor) >= MIN_CUDA_CAPABILITY
