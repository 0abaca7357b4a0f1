"""Resource usage of a compiled kernel, parsed from the output of tools. Imports neither torch nor triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1024

SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_90": 227 * KIB, "gfx942": 64 * KIB}
"""Maximum shared memory per block in bytes (CUDA C++ programming guide, compute capabilities; CDNA3 ISA)."""

_WARP_GROUP_ROWS = 64

# On sm_90 the cubin includes the 1 KiB per block that the system reserves. The limit above excludes it.
_RESERVED_SHARED = {"sm_80": 0, "sm_86": 0, "sm_90": KIB}

_SASS_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
_CUBIN_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")
_SASS_MATRIX = ("HMMA", "HGMMA")
_AMD_OPCODE = re.compile(r"^\s+([a-z]+_[a-z0-9]+)", re.MULTILINE)


def matrix_opcode(target: str, tile_rows: int) -> str:
    """Prefix of the matrix instructions for a product with `tile_rows` rows on a chip.

    Hopper's warp-group instructions need 64 rows. Smaller tiles use Ampere's instructions.
    """
    if target == "sm_90":
        return "HGMMA" if tile_rows >= _WARP_GROUP_ROWS else "HMMA"
    return "HMMA" if target.startswith("sm_") else "v_mfma"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resource usage of one compiled kernel. Registers and spills are per thread."""

    registers: int
    spill_bytes: int
    """Stack and local memory (NVIDIA), scratch memory (AMD)."""

    spill_instructions: int
    """Loads and stores of that memory in the machine code."""

    shared_bytes: int
    matrix_instructions: Mapping[str, int]
    """Number of matrix instructions by prefix."""


def nvidia_resources(text: str, *, target: str, launch_shared: int) -> Resources:
    """Parse the output of `cuobjdump --dump-resource-usage -sass`.

    launch_shared: shared memory that a launch requests.

    Registers spill to local memory. In a kernel without spills, the cubin's STACK and LOCAL bytes and the number of LDL
    and STL instructions are all 0. Raises ValueError if the output has no figures.
    """
    usage = _CUBIN_USAGE.search(text)
    opcodes = Counter(_SASS_OPCODE.findall(text))
    if usage is None or not opcodes:
        raise ValueError(f"cuobjdump printed no resource usage or no instructions: {text[:200]!r}")
    return Resources(
        registers=int(usage["registers"]),
        spill_bytes=int(usage["stack"]) + int(usage["local"]),
        spill_instructions=opcodes["LDL"] + opcodes["STL"],
        shared_bytes=max(0, int(usage["shared"]) - _RESERVED_SHARED[target]) + launch_shared,
        matrix_instructions={name: opcodes[name] for name in _SASS_MATRIX},
    )


def amd_resources(assembly: str, *, launch_shared: int) -> Resources:
    """Parse the assembly of the AMDGPU backend and the metadata at its end.

    launch_shared: shared memory that a launch requests.

    Registers are vector registers, including accumulators. A scalar register spills to a lane of a vector register, or
    to scratch memory if no lane is left. Scratch memory therefore counts everything that leaves the registers. Raises
    ValueError if the metadata is missing.
    """
    scratch = _amd_metadata(assembly, "private_segment_fixed_size")
    opcodes = Counter(_AMD_OPCODE.findall(assembly))
    return Resources(
        registers=_amd_metadata(assembly, "vgpr_count"),
        spill_bytes=max(scratch, 4 * _amd_metadata(assembly, "vgpr_spill_count")),
        spill_instructions=opcodes["scratch_load"] + opcodes["scratch_store"],
        shared_bytes=_amd_metadata(assembly, "group_segment_fixed_size") + launch_shared,
        matrix_instructions={"v_mfma": opcodes["v_mfma"]},
    )


def problems(resources: Resources, *, target: str, needs: str | None) -> list[str]:
    """List the problems of a kernel on a target.

    needs: the `matrix_opcode` of a matrix kernel, or None.
    """
    found = []
    if resources.spill_bytes or resources.spill_instructions:
        found.append(f"spills {resources.spill_bytes} bytes a thread ({resources.spill_instructions} instructions)")
    if resources.shared_bytes > SHARED_LIMIT[target]:
        found.append(f"takes {resources.shared_bytes} bytes of shared memory; {target} has {SHARED_LIMIT[target]}")
    if needs and not resources.matrix_instructions.get(needs):
        found.append(f"has no {needs} instruction")
    return found


def disassemble(cubin: bytes, cuobjdump: str) -> str:
    """Resource usage and machine code of a cubin, as printed by `cuobjdump`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_metadata(assembly: str, key: str) -> int:
    found = re.search(rf"^ +(?:- )?\.{key}:\s+(\d+)", assembly, re.MULTILINE)
    if found is None:
        raise ValueError(f"the assembly's metadata has no .{key}")
    return int(found[1])
