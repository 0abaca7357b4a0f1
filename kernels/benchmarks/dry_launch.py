"""Run every kernel launch through Triton's JIT without a GPU, except for the launch itself.

    python kernels/benchmarks/dry_launch.py [--kernel NAME …] [--select REGEX] [--jobs N]

Each case of `dry_cases` calls one public function on CPU tensors, forward and backward. Triton binds and specialises
the arguments, compiles the kernel for sm_90, compares the globals that the kernel reads with their values at
compilation, and evaluates the grid. Then it calls the launcher of `DryDriver`, which checks the grid and records the
launch. No kernel runs, so outputs are uninitialised.

A case fails if it raises, if its forward or its backward launches nothing, if a grid is not made of integers from 1 to
CUDA's limits, or if a block needs more threads or shared memory than the chip has. A run without --select also fails
if a kernel of the chosen `compile_specs()` is never launched, if no launch equals one of these specs (argument types,
alignment, constants, warps, stages), or if a launched kernel has no spec. The offline compile therefore compiles the
kernels as they are launched. Exit code 1: something failed. Exit code 2: an unknown kernel, a --select without a
match, or TRITON_INTERPRET=1.

A dry launch does not show results, races, accesses outside the tensors, or speed. It does not show register spills
(`compile_offline.py` does), or errors of the real driver, such as inaccessible pointers or insufficient memory. It does
not test choices that depend on measurements: the kernels have no autotuning, and attention never uses FlashAttention
here. The tensors have few rows, so the grids are small.

A complete run has 350 cases and 919 launches. 326 of these cases took two to three minutes on two CPU cores (AMD EPYC,
triton 3.7.1, empty cache, 2026-11-30).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from compile_offline import KERNELS, clear_progress, in_processes, positive, show_progress, specs_of
from dry_cases import DryCase, cases_of
from gpu_checks import as_tuple
from machine_code import SHARED_LIMIT
from triton.backends.compiler import GPUTarget

import arc_kernels as ak
from arc_kernels._compile import CompileSpec

TARGET = "sm_90"
PROCESSORS = 132  # multiprocessors of an H100
MAX_THREADS = 1024  # per block
MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch, as received by the launcher."""

    kernel: str
    """Name of the `@triton.jit` function."""

    signature: Mapping[str, str]
    """Type of each argument that is not a constant."""

    constants: Mapping[str, Any]
    """Value of each `tl.constexpr` argument, and of each other argument that Triton treats as constant: None or 1."""

    divisible_by_16: frozenset[str]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]

    def is_of(self, spec: CompileSpec) -> bool:
        """Whether the offline compiler compiles exactly this launch for `spec`."""
        return (
            self.kernel == spec.fn.__name__
            and self.signature == spec.signature
            and self.constants == spec.constexprs
            and self.divisible_by_16 == frozenset(spec.divisible_by_16)
            and self.num_warps == spec.num_warps
            and self.num_stages == spec.num_stages
        )


class DryDriver:
    """A Triton driver whose device is the CPU and whose launcher only records. Written for Triton 3.6 and 3.7.1."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    @property
    def utils(self) -> DryDriver:
        """Triton calls `get_device_properties` and `load_binary` on `driver.utils`."""
        return self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(TARGET.removeprefix("sm_")), 32)

    def get_current_device(self) -> DryDriver:
        """A key of Triton's caches: a compiled kernel keeps its launcher, so drivers must not share kernels."""
        return self

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: Any) -> dict[str, int]:
        """The shared memory that Triton allows per block."""
        return {"max_shared_mem": SHARED_LIMIT[TARGET], "multiprocessor_count": PROCESSORS}

    def load_binary(
        self, name: str, binary: bytes, shared_bytes: int, device: Any
    ) -> tuple[object, object, int, int, int]:
        """Module, function, registers, spills and the threads that Triton allows per block."""
        return object(), object(), 0, 0, MAX_THREADS

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """The launcher of one compiled kernel. Triton passes the grid as its first arguments."""
        return partial(self._launch, source, metadata)

    def _launch(self, source: Any, metadata: Any, grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
        """Record a launch instead of doing it. Raises ValueError if CUDA would reject the grid or start no program."""
        kernel, grid = source.fn.__name__, (grid_x, grid_y, grid_z)
        for size, limit in zip(grid, MAX_GRID, strict=True):
            if type(size) is not int or not 1 <= size <= limit:
                raise ValueError(f"the grid of {kernel} is {grid}; expected integers from 1 to {MAX_GRID}")
        names = source.fn.arg_names
        self.launches.append(
            Launch(
                kernel=kernel,
                signature={name: kind for name, kind in source.signature.items() if kind != "constexpr"},
                constants={names[place]: value for (place,), value in source.constants.items()},
                divisible_by_16=frozenset(
                    names[place]
                    for (place,), attributes in source.attrs.items()
                    if ["tt.divisibility", 16] in attributes
                ),
                num_warps=metadata.num_warps,
                num_stages=metadata.num_stages,
                grid=grid,
            )
        )


@contextmanager
def dry_launches() -> Iterator[DryDriver]:
    """Context in which all functions of `arc_kernels` launch their kernels on CPU tensors without running them.

    The context yields the driver that records the launches. It affects the whole process, not only this thread.
    Attention uses the tiles of TARGET, and the norms its number of multiprocessors.

    Raises RuntimeError under TRITON_INTERPRET=1, because the interpreter does not launch kernels.
    """
    from arc_kernels import _dispatch
    from arc_kernels.attention import kernels as attention_kernels
    from arc_kernels.norm import kernels as norm_kernels

    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: under the interpreter nothing is launched")
    driver, config = DryDriver(), triton.runtime.driver
    before = config._active  # `config.active` would look for a GPU
    with ExitStack() as stack:
        stack.enter_context(patch.object(_dispatch, "_cpu_tensors_are_taken", lambda: True))
        stack.enter_context(patch.object(attention_kernels, "chip_of", lambda device: TARGET))
        stack.enter_context(patch.object(norm_kernels, "num_processors", lambda device: PROCESSORS))
        stack.enter_context(ak.use("triton"))
        stack.enter_context(ak.use_attention("triton"))
        stack.callback(config.set_active, before)
        config.set_active(driver)
        yield driver


class Job(NamedTuple):
    """One case. A worker finds it by name, because its function cannot be pickled."""

    kernel: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the program's output."""

    job: Job
    launches: tuple[Launch, ...] = ()
    problem: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code is 1 after a failure."""
    arguments = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: under the interpreter nothing is launched", file=sys.stderr)
        return 2
    every = [Job(kernel, name) for kernel in arguments.kernel for name in cases_of(kernel)]
    jobs = [job for job in every if re.search(arguments.select, job.name)]
    if not jobs:
        print(f"no case's name matches {arguments.select!r}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    for outcome in in_processes(run_job, jobs, arguments.jobs):
        outcomes.append(outcome)
        clear_progress()
        result = f"FAILED: {outcome.problem}" if outcome.problem else ", ".join(x.kernel for x in outcome.launches)
        print(f"{outcome.job.kernel}: {outcome.job.name}: {result}", flush=True)
        show_progress(len(outcomes), len(jobs))
    clear_progress()
    return _conclude(outcomes, arguments.kernel if len(jobs) == len(every) else ())


def run_job(job: Job) -> Outcome:
    """Run one case. An exception becomes the problem of the outcome."""
    # A notice about the next triton's default, once per process. It does not concern this kernel.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    with dry_launches() as driver:
        try:
            launch_case(cases_of(job.kernel)[job.name], driver)
        except Exception as error:  # continue with the other cases
            problem = f"{type(error).__name__}: {_shortened(str(error))}"
            return Outcome(job=job, launches=tuple(driver.launches), problem=problem)
    return Outcome(job=job, launches=tuple(driver.launches))


def launch_case(case: DryCase, driver: DryDriver) -> None:
    """Run forward and, if the case has gradients, backward. Raises ValueError if either launches nothing."""
    inputs = case.inputs()
    leaves = [inputs[name].requires_grad_() for name in case.wants_grad]
    outputs = as_tuple(case.function(**inputs))
    num_forward = len(driver.launches)
    if num_forward == 0:
        raise ValueError("forward launched nothing")
    if leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        if len(driver.launches) == num_forward:
            raise ValueError("backward launched nothing")


def missing_launches(launches: Iterable[Launch], kernels: Iterable[str]) -> list[str]:
    """Messages about kernels and specs without a launch, and launched kernels without a spec.

    launches: launches of all cases of the kernels.
    kernels: folders of `arc_kernels`.
    """
    every = [spec for kernel in KERNELS for spec in specs_of(kernel, TARGET).values()]
    expected = [spec for kernel in kernels for spec in specs_of(kernel, TARGET).values()]
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    found = []
    for name in dict.fromkeys(spec.fn.__name__ for spec in expected):
        if name not in by_kernel:
            found.append(f"{name} was never launched")
    for spec in expected:
        candidates = by_kernel.get(spec.fn.__name__, [])
        if candidates and not any(launch.is_of(spec) for launch in candidates):
            found.append(f"no launch equals the spec {spec.name!r}")
    known = {spec.fn.__name__ for spec in every}
    return found + [f"{name} was launched, but has no spec" for name in by_kernel if name not in known]


def _shortened(message: str) -> str:
    """Shorten a message to one line. Keeps both ends: a compile error starts with a place and ends with the reason."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:100]} … {line[-200:]}"


def _conclude(outcomes: list[Outcome], whole_kernels: Sequence[str]) -> int:
    """Print totals and failures, and return the exit code.

    outcomes: outcomes of all cases that ran.
    whole_kernels: kernels whose cases all ran. They are checked against their specs.
    """
    launches = [launch for outcome in outcomes for launch in outcome.launches]
    counts = Counter(launch.kernel for launch in launches)
    problems = [
        f"{outcome.job.kernel}: {outcome.job.name}: {outcome.problem}" for outcome in outcomes if outcome.problem
    ]
    missing = missing_launches(launches, whole_kernels)
    print("launches: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(
        f"{len(outcomes)} cases, {len(launches)} launches of {len(counts)} kernels for {TARGET}: "
        f"{len(problems)} failed, {len(missing)} missing"
    )
    for line in (*problems, *missing):
        print(f"  {line}")
    return 1 if problems or missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Launch the Triton kernels without a GPU; see the file's docstring.")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="which kernels (default: all)")
    parser.add_argument("--select", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
