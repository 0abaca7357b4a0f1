"""The attention kernels for the offline compiler: the tables of `configs` with the heads of known models."""

from __future__ import annotations

from typing import Any, Literal

import torch

from arc_kernels._compile import CompileSpec, arguments_of
from arc_kernels.attention.backward import delta_kernel, dkv_kernel, dq_kernel
from arc_kernels.attention.configs import DELTA_BLOCK, Chip, Kernel, block_h, choose
from arc_kernels.attention.forward import forward_kernel

Mode = Literal["full", "causal", "limits", "causal window", "limits window"]

_KERNELS: dict[Kernel, Any] = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_OPERANDS = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "q_turned")
_STATISTICS = ("lse", "delta", "cos", "sin")
_TURNING = ("cos", "sin", "q_turned")
_INDICES = ("cu_q", "cu_k", "k_limits")
_UNSPECIALISED = ("num_q_rows", "num_k_rows", "num_segments", "window")
_LONG = 4096  # rows; longer than any tile

_ALL: tuple[Mode, ...] = ("full", "causal", "limits")

# Head size, heads per kv head, masks: the smallest tiles; Llama 3.2 1B; a head size that is not a power of two; Llama
# 3.2 3B, whose three heads do not divide a tile; Llama 3 8B and Mistral 7B; the widest tiles (Gemma 2 9B).
_HEADS: tuple[tuple[int, int, tuple[Mode, ...]], ...] = (
    (32, 1, ("causal",)),
    (64, 4, ("full", "causal")),
    (80, 1, ("full",)),
    (128, 3, ("full", "causal")),
    (128, 4, _ALL),
    (256, 2, _ALL),
)

_TURNED_HEADS: tuple[tuple[int, int, Mode], ...] = (
    (64, 4, "causal"),
    (80, 1, "full"),
    (128, 3, "full"),
    (128, 4, "causal"),
    (256, 2, "causal"),
)

# With a window, whose length is a run-time argument: Phi-3 mini, Mistral 7B 0.1, OLMo 3 32B and Gemma 2 9B in training,
# and the limits of pooled queries and of generation.
_WINDOWED_HEADS: tuple[tuple[int, int, Mode, bool], ...] = (
    (96, 1, "causal window", True),
    (128, 4, "causal window", True),
    (128, 5, "causal window", True),
    (128, 4, "limits window", False),
    (256, 2, "causal window", True),
    (256, 2, "limits window", False),
)


def compile_specs(chip: Chip = "sm_90") -> list[CompileSpec]:
    """All kernels with the configs of one chip. Compile them for that chip: block sizes depend on its shared memory."""
    shapes: list[tuple[str, int, int, Mode, int, bool]] = [
        *(("bf16", head_dim, group, mode, _LONG, False) for head_dim, group, modes in _HEADS for mode in modes),
        *((dtype, head_dim, 4, "causal", _LONG, False) for dtype in ("fp16", "fp32") for head_dim in (64, 128, 256)),
        *(("bf16", head_dim, 4, "causal", longest, False) for head_dim in (128, 256) for longest in (16, 64)),
        *(("bf16", head_dim, group, mode, _LONG, True) for head_dim, group, mode in _TURNED_HEADS),
        *(("bf16", head_dim, group, mode, _LONG, turns) for head_dim, group, mode, turns in _WINDOWED_HEADS),
    ]
    specs = [_spec(kernel, chip, *shape) for shape in shapes for kernel in _KERNELS]
    deltas = (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 128), ("fp32", 256))
    return [*specs, *(_delta_spec(dtype, head_dim) for dtype, head_dim in deltas)]


def _spec(
    kernel: Kernel, chip: Chip, dtype: str, head_dim: int, group: int, mode: Mode, longest: int, turns: bool
) -> CompileSpec:
    config = choose(kernel, chip=chip, head_dim=head_dim, dtype=_DTYPES[dtype], num_rows=longest, num_keys=longest)
    fn = _KERNELS[kernel]
    types = dict.fromkeys(_OPERANDS, f"*{dtype}") | dict.fromkeys(_STATISTICS, "*fp32")
    types |= dict.fromkeys(_INDICES, "*i32") | {"scale": "fp32", "softmax_scale": "fp32"}
    constexprs: dict[str, Any] = {
        "N": 8 * group,
        "GROUP": group,
        "H": head_dim,
        "BLOCK_H": block_h(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CAUSAL": mode.startswith("causal"),
        "LIMITED": mode.startswith("limits"),
        "TURNS": turns,
    }
    if kernel == "forward":
        constexprs["KEEPS_TURNED"] = turns
    if not turns:
        constexprs |= dict.fromkeys(name for name in _TURNING if name in fn.arg_names)
    if not mode.endswith("window"):
        constexprs["window"] = None
    shape = f"H={head_dim} group={group} {mode} rows={longest}{' turned' if turns else ''}"
    return CompileSpec(
        name=f"attention_{kernel} {dtype} {shape} ({chip})",
        fn=fn,
        **arguments_of(fn, dtype, constexprs, types=types, odd=_UNSPECIALISED),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        uses_dot=dtype != "fp32",  # float32 is multiplied without tensor cores
    )


def _delta_spec(dtype: str, head_dim: int) -> CompileSpec:
    return CompileSpec(
        name=f"attention_delta {dtype} H={head_dim}",
        fn=delta_kernel,
        signature={"o": f"*{dtype}", "do": f"*{dtype}", "delta": "*fp32", "num_rows": "i32"},
        constexprs={"H": head_dim, "BLOCK_H": block_h(head_dim), "BLOCK_M": DELTA_BLOCK},
        num_warps=4,
        divisible_by_16=("o", "do", "delta"),
    )
