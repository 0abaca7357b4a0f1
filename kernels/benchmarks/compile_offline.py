"""Compile every kernel for sm_80, sm_86, sm_90 and gfx942 without a GPU and print its resource usage.

    python kernels/benchmarks/compile_offline.py [--kernel NAME …] [--target NAME …] [--select REGEX] [--csv FILE]

There is one row per entry of the kernels' `compile_specs()` and target. It has registers and spilled bytes per thread,
shared memory per block, and the number of matrix (tensor-core) instructions in the machine code. The exit code is 1 if
a kernel does not compile, spills, exceeds the chip's shared memory per block, or is a matrix kernel without matrix
instructions; these rows are listed. The tools that read NVIDIA's machine code come with triton.

A complete run has 984 rows. 888 of them took about a quarter of an hour on two idle CPU cores (AMD EPYC, triton 3.7.1,
2026-11-22: the first 284 in under four minutes). Kernels in triton's cache are not compiled again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from machine_code import (
    SHARED_LIMIT,
    Resources,
    amd_resources,
    disassemble,
    matrix_opcode,
    nvidia_resources,
    problems,
)
from rows import append_lines, stamp

KERNELS = ("attention", "cross_entropy", "norm", "pooling", "rotary", "splice", "swiglu")
TARGETS = tuple(SHARED_LIMIT)

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One compilation. A worker finds its spec by name, because specs contain functions that cannot be pickled."""

    kernel: str
    target: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. Figures are empty if the kernel did not compile."""

    kernel: str
    name: str
    target: str
    num_warps: int
    num_stages: int
    registers: int | str = ""
    spill_bytes: int | str = ""
    shared_bytes: int | str = ""
    matrix_opcode: str = ""
    """The instruction that a matrix kernel must contain; empty for other kernels."""

    matrix_instructions: int | str = ""
    problems: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code is 1 if a row has a problem."""
    arguments = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: under the interpreter there is nothing to compile", file=sys.stderr)
        return 2
    jobs = [
        Job(kernel=kernel, target=target, name=name)
        for kernel in arguments.kernel
        for target in arguments.target
        for name in specs_of(kernel, target)
        if re.search(arguments.select, name)
    ]
    if not jobs:
        print(f"no kernel's name matches {arguments.select!r}", file=sys.stderr)
        return 2
    origin = {key: value for key, value in stamp("").items() if key in ("date", "triton", "commit")}
    rows: list[Row] = []
    for row in in_processes(compile_row, jobs, arguments.jobs):
        if not rows:
            print(_line("kernel", "target", "warps", "registers", "spill B", "shared B", "matrix instructions"))
        rows.append(row)
        if arguments.csv:
            append_lines(arguments.csv, [origin | asdict(row)])  # at once: an interrupted run keeps its rows
        clear_progress()
        matrix = f"{row.matrix_instructions} {row.matrix_opcode}" if row.matrix_opcode else "-"
        print(
            _line(row.name, row.target, row.num_warps, row.registers, row.spill_bytes, row.shared_bytes, matrix)
            + (f"  {row.problems}" if row.problems else ""),
            flush=True,
        )
        show_progress(len(rows), len(jobs))
    clear_progress()
    wrong = [row for row in rows if row.problems]
    print(f"{len(rows)} compiled for {', '.join(arguments.target)}: {len(wrong)} with problems")
    for row in wrong:
        print(f"  {row.name} on {row.target}: {row.problems}")
    return 1 if wrong else 0


def compile_row(job: Job) -> Row:
    """Compile one kernel and read its machine code. A compile error gives a row with that problem."""
    # A notice about the next triton's default, once per process. It does not concern this kernel.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    spec = specs_of(job.kernel, job.target)[job.name]
    warps = spec.hip_num_warps if job.target.startswith("gfx") and spec.hip_num_warps else spec.num_warps
    row = Row(
        kernel=job.kernel,
        name=job.name,
        target=job.target,
        num_warps=warps,
        num_stages=spec.num_stages,
        matrix_opcode=matrix_opcode(job.target, _tile_rows(spec)) if spec.uses_dot else "",
    )
    try:
        resources = resources_of(spec, job.target)
    except Exception as error:  # compiler passes raise any type; the other kernels still need rows
        return replace(row, problems=f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}")
    return replace(
        row,
        registers=resources.registers,
        spill_bytes=resources.spill_bytes,
        shared_bytes=resources.shared_bytes,
        matrix_instructions=resources.matrix_instructions[row.matrix_opcode] if spec.uses_dot else "",
        problems="; ".join(problems(resources, target=job.target, needs=row.matrix_opcode)),
    )


def resources_of(spec: Any, target: str) -> Resources:
    """Compile one spec for a target and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    from arc_kernels._compile import compile_spec

    if target.startswith("gfx"):
        compiled = compile_spec(spec, GPUTarget("hip", target, 64))
        return amd_resources(compiled.asm["amdgcn"], launch_shared=compiled.metadata.shared)
    compiled = compile_spec(spec, GPUTarget("cuda", int(target.removeprefix("sm_")), 32))
    text = disassemble(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    return nvidia_resources(text, target=target, launch_shared=compiled.metadata.shared)


def _tile_rows(spec: Any) -> int:
    """Rows of an attention kernel's matrix products: keys in the kernel of their gradients, otherwise queries."""
    return spec.constexprs["BLOCK_N" if spec.name.startswith("attention_dkv") else "BLOCK_M"]


@cache
def specs_of(kernel: str, target: str) -> dict[str, Any]:
    """The specs of a kernel by name. Only attention's tiles depend on the chip."""
    module = import_module(f"arc_kernels.{kernel}.kernels")
    specs = module.compile_specs(target) if kernel == "attention" else module.compile_specs()
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) < len(specs):
        raise ValueError(f"names in {kernel}'s compile_specs() repeat; expected unique names")
    return by_name


def in_processes(function: Callable[[_Job], _Result], jobs: list[_Job], num_workers: int) -> Iterator[_Result]:
    """Yield the results of all jobs in order, as soon as they are available."""
    show_progress(0, len(jobs))
    if num_workers == 1:
        yield from map(function, jobs)
        return
    # Spawn processes: LLVM's and torch's threads do not survive a fork.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def _line(*cells: object) -> str:
    name, target, *figures = (str(cell) for cell in cells)
    *numbers, matrix = figures
    return " ".join([f"{name:<58} {target:<7}", *(f"{number:>9}" for number in numbers), f"  {matrix:<12}"])


def show_progress(done: int, total: int) -> None:
    """Show the number of rows on a terminal. `clear_progress` removes the line before the next row."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total}", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    """See `show_progress`."""
    if sys.stderr.isatty():
        print("\r" + " " * 20 + "\r", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU; see the file's docstring.")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="which kernels (default: all)")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, help="which chips (default: all)")
    parser.add_argument("--select", default="", metavar="REGEX", help="only specs whose name matches")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return parser


def positive(text: str) -> int:
    """Parse a number of processes for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
