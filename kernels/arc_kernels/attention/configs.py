"""Block sizes of the attention kernels by chip, head size and dtype. Plain tables, without a search at run time.

All entries compile without spills and fit the chip's shared memory, if possible twice per multiprocessor. `specs` and
the offline compiler check this.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "dq", "dkv"]
Chip = Literal["sm_90", "sm_80", "sm_86", "gfx942"]
CHIPS: tuple[Chip, ...] = ("sm_90", "sm_80", "sm_86", "gfx942")
MAX_HEAD_DIM = 256
DELTA_BLOCK = 64  # rows per program of the delta kernel: 16 KiB of each tensor in flight at head size 128


class Config(NamedTuple):
    """The launch parameters of one kernel.

    block_m: packed query rows per tile, a power of two, at least 16.
    block_n: keys per tile, a power of two, at least 16.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_Table = dict[int, dict[Kernel, Config]]  # [largest head size][kernel]

# sm_90: tiles of 128 rows and 8 warps: each of two warp groups issues 64-row matrix instructions. 128 keys if the
# registers can hold both scores and sums. At head size 128 they cannot: with three heads per kv head such a forward
# spilled 104 bytes per thread. At head size 256, 128 rows of rotated queries spilled 96 bytes.
# sm_80: the same rows, but fewer keys at a time, because operands pass through registers.
# sm_86 (also sm_89 and sm_120): 99 KiB of shared memory; registers as on sm_80, but fewer stages.
# gfx942: 64 KiB of shared memory, but twice the registers; one stage, because copies are not asynchronous.
_SIXTEEN_BITS: dict[Chip, _Table] = {
    "sm_90": {
        64: {"forward": Config(128, 128, 8, 2), "dq": Config(128, 64, 8, 2), "dkv": Config(64, 128, 8, 2)},
        128: {"forward": Config(128, 64, 8, 3), "dq": Config(128, 64, 8, 2), "dkv": Config(32, 128, 8, 2)},
        256: {"forward": Config(64, 32, 8, 2), "dq": Config(32, 32, 8, 1), "dkv": Config(32, 32, 8, 1)},
    },
    "sm_80": {
        64: {"forward": Config(128, 64, 8, 3), "dq": Config(128, 64, 8, 2), "dkv": Config(32, 128, 8, 2)},
        128: {"forward": Config(128, 32, 8, 3), "dq": Config(64, 64, 8, 2), "dkv": Config(32, 64, 8, 2)},
        256: {"forward": Config(64, 32, 8, 2), "dq": Config(64, 32, 8, 1), "dkv": Config(32, 32, 8, 2)},
    },
    "sm_86": {
        64: {"forward": Config(128, 64, 8, 2), "dq": Config(128, 64, 8, 2), "dkv": Config(32, 128, 8, 2)},
        128: {"forward": Config(128, 32, 8, 2), "dq": Config(64, 64, 8, 2), "dkv": Config(32, 64, 8, 2)},
        256: {"forward": Config(64, 32, 8, 2), "dq": Config(64, 32, 8, 1), "dkv": Config(32, 32, 8, 2)},
    },
    "gfx942": {
        64: {"forward": Config(128, 64, 4, 1), "dq": Config(128, 64, 4, 1), "dkv": Config(64, 64, 4, 1)},
        128: {"forward": Config(128, 64, 4, 1), "dq": Config(64, 64, 4, 1), "dkv": Config(32, 64, 4, 1)},
        256: {"forward": Config(64, 32, 4, 1), "dq": Config(32, 32, 4, 1), "dkv": Config(32, 32, 4, 1)},
    },
}

# float32 is multiplied without tensor cores, with operands in registers. Tiles are small on every chip, because larger
# ones exceed the registers of some chip.
_THIRTY_TWO_BITS: _Table = {
    128: {"forward": Config(32, 32, 8, 1), "dq": Config(16, 16, 4, 1), "dkv": Config(16, 32, 8, 1)},
    256: {"forward": Config(16, 16, 8, 1), "dq": Config(16, 16, 8, 1), "dkv": Config(16, 16, 8, 1)},
}


@cache
def chip_of(device: torch.device) -> Chip:
    """The table for a device. The interpreter on the CPU uses that of sm_80."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    return "sm_90" if capability[0] in (9, 10) else "sm_86"


def choose(kernel: Kernel, *, chip: Chip, head_dim: int, dtype: torch.dtype, num_rows: int, num_keys: int) -> Config:
    """The config of a kernel.

    num_rows: packed query rows (queries times heads per kv head) of the longest segment.
    num_keys: keys of the longest segment.

    If all segments are short, most of a tile would be empty. The dimension that is split into programs then uses tiles
    of 16 or 64; only these two sizes, to compile few variants. The number of warps stays, and a program reads at most
    64 keys at a time: fewer warps or more keys exceeded the registers on sm_90.
    """
    table = _THIRTY_TWO_BITS if dtype == torch.float32 else _SIXTEEN_BITS[chip]
    config = table[min(width for width in table if width >= head_dim)][kernel]
    if table is _THIRTY_TWO_BITS and chip == "gfx942":
        config = config._replace(num_warps=config.num_warps // 2)  # with 64 lanes each
    longest, block = (num_keys, config.block_n) if kernel == "dkv" else (num_rows, config.block_m)
    small = next((size for size in (16, 64) if longest <= size < block), None)
    if small is None:
        return config
    if kernel == "dkv":
        return config._replace(block_n=small)
    return config._replace(block_m=small, block_n=min(config.block_n, 64))


def block_h(head_dim: int) -> int:
    """Width of a tile that holds a head: a power of two, at least 16 as tl.dot requires."""
    return max(16, 1 << (head_dim - 1).bit_length())
