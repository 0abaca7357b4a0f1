"""What a compiled kernel takes of a processor, read from the tools' output. Imports neither torch nor triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1024

SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_90": 227 * KIB, "gfx942": 64 * KIB}
"""Shared memory that one block may have, bytes (CUDA C++ programming guide, compute capabilities; CDNA3 ISA)."""

_WARP_GROUP_ROWS = 64

# On sm_90 the cubin counts the 1 KiB that the system keeps of each block; the limit above is without it.
_RESERVED_SHARED = {"sm_80": 0, "sm_86": 0, "sm_90": KIB}

_SASS_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
_CUBIN_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")
_SASS_MATRIX = ("HMMA", "HGMMA")
_AMD_OPCODE = re.compile(r"^\s+([a-z]+_[a-z0-9]+)", re.MULTILINE)


def matrix_opcode(target: str, tile_rows: int) -> str:
    """What the matrix instructions begin with that a product of so many rows has on a chip.

    Hopper's warp-group instructions take 64 rows; smaller tiles have those of Ampere.
    """
    if target == "sm_90":
        return "HGMMA" if tile_rows >= _WARP_GROUP_ROWS else "HMMA"
    return "HMMA" if target.startswith("sm_") else "v_mfma"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one compiled kernel; registers and spills are those of one thread."""

    registers: int
    spill_bytes: int
    """Stack and local memory (NVIDIA), scratch memory (AMD)."""

    spill_instructions: int
    """Loads and stores of that memory in the machine code."""

    shared_bytes: int
    matrix_instructions: Mapping[str, int]
    """How many of each, by what they begin with."""


def nvidia_resources(text: str, *, target: str, launch_shared: int) -> Resources:
    """From the output of `cuobjdump --dump-resource-usage -sass`, and the shared memory that a launch asks for.

    A register that is spilled goes to local memory: the cubin's STACK and LOCAL bytes, and the LDL and STL
    instructions, are all nought in a kernel without spills. ValueError where the output has no figures.
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
    """From the assembly of the AMDGPU backend and the metadata at its end.

    Registers are vector registers, accumulators included. A scalar register that is spilled goes to a lane of a vector
    register, and to scratch memory where there is none left: so scratch memory counts all that leaves the registers.
    ValueError where the metadata is missing.
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
    """What is wrong with a kernel on a target, in words; empty where nothing is.

    needs: the `matrix_opcode` of a matrix kernel.
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
    """Resource usage and machine code of a cubin, as `cuobjdump` prints them."""
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
