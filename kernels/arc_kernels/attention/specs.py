"""The attention kernels for the offline compiler: the tables of `configs` with the heads of known models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from arc_kernels._compile import CompileSpec
from arc_kernels.attention.backward import delta_kernel, dkv_kernel, dq_kernel
from arc_kernels.attention.configs import DELTA_BLOCK, Chip, Kernel, block_h, choose
from arc_kernels.attention.forward import forward_kernel

Mode = Literal["full", "causal", "limits"]

_KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_OPERANDS = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "q_turned")
_STATISTICS = ("lse", "delta", "cos", "sin")
_TURNING = ("cos", "sin", "q_turned")
_INDICES = ("cu_q", "cu_k", "k_limits")
_STRIDES = ("stride_q", "stride_k", "stride_v")
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


def compile_specs(chip: Chip = "sm_90") -> list[CompileSpec]:
    """All kernels with the configs of one chip. Compile them for that chip: block sizes depend on its shared memory."""
    specs = [
        _spec(kernel, chip, "bf16", head_dim, group, mode)
        for head_dim, group, modes in _HEADS
        for mode in modes
        for kernel in _names()
    ]
    others = (("fp16", 64), ("fp16", 128), ("fp16", 256), ("fp32", 64), ("fp32", 128), ("fp32", 256))
    specs += [_spec(kernel, chip, dtype, head_dim, 4, "causal") for dtype, head_dim in others for kernel in _names()]
    specs += [
        _spec(kernel, chip, "bf16", head_dim, 4, "causal", longest)
        for head_dim in (128, 256)
        for longest in (16, 64)
        for kernel in _names()
    ]
    specs += [
        _spec(kernel, chip, "bf16", head_dim, group, mode, turns=True)
        for head_dim, group, mode in _TURNED_HEADS
        for kernel in _names()
    ]
    deltas = (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 128), ("fp32", 256))
    return [*specs, *(_delta_spec(dtype, head_dim) for dtype, head_dim in deltas)]


def _names() -> Iterator[Kernel]:
    yield from ("forward", "dq", "dkv")


def _spec(
    kernel: Kernel,
    chip: Chip,
    dtype: str,
    head_dim: int,
    group: int,
    mode: Mode,
    longest: int = _LONG,
    *,
    turns: bool = False,
) -> CompileSpec:
    config = choose(kernel, chip=chip, head_dim=head_dim, dtype=_DTYPES[dtype], num_rows=longest, num_keys=longest)
    arguments = _KERNELS[kernel].arg_names
    types = dict.fromkeys(_OPERANDS, f"*{dtype}") | dict.fromkeys(_STATISTICS, "*fp32")
    types |= dict.fromkeys(_INDICES, "*i32") | dict.fromkeys(_STRIDES, "i32")
    divisible = tuple(name for name in arguments if name in types)
    types |= dict.fromkeys(("num_q_rows", "num_k_rows", "num_segments"), "i32")
    types |= {"scale": "fp32", "softmax_scale": "fp32"}
    constexprs: dict[str, Any] = {"KEEPS_TURNED": turns} if kernel == "forward" else {}
    if not turns:
        absent = tuple(name for name in _TURNING if name in arguments)
        types = {name: kind for name, kind in types.items() if name not in absent}
        divisible = tuple(name for name in divisible if name not in absent)
        constexprs |= dict.fromkeys(absent)
    shape = f"H={head_dim} group={group} {mode} rows={longest}{' turned' if turns else ''}"
    return CompileSpec(
        name=f"attention_{kernel} {dtype} {shape} ({chip})",
        fn=_KERNELS[kernel],
        signature={name: types[name] for name in arguments if name in types},
        constexprs={
            "N": 8 * group,
            "GROUP": group,
            "H": head_dim,
            "BLOCK_H": block_h(head_dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "CAUSAL": mode == "causal",
            "LIMITED": mode == "limits",
            "TURNS": turns,
            **constexprs,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=divisible,
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
