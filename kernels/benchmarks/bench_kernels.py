"""Times the Triton kernels on a GPU against plain torch, torch.compile and what other libraries have.

    python kernels/benchmarks/bench_kernels.py [--kernel NAME …] [--quick] [--csv FILE]
    python kernels/benchmarks/bench_kernels.py --check        # small cases, results only; any device

Each case is first compared with the reference: outputs and gradients may err at most twice as much as torch does in
bfloat16, both against float32. A case that fails is not timed, and the exit code is 1. Then forward, backward and both
together are timed (median, caches flushed; `gpu_timing`), ours and the others in one run; floors are those of
`gpu_cases`, the copy bandwidth is measured in the same run. Rows are appended to kernels/benchmarks/results.csv.
Without a GPU nothing is measured; under TRITON_INTERPRET=1 `--check` runs on the CPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from checkout import commit
from gpu_attention import attention_cases
from gpu_cases import FULL, QUICK, TINY, Case, Function, cases
from gpu_checks import check_case, same_result
from gpu_timing import copy_bandwidth, median_ms, peak_extra_bytes
from torch import Tensor

import arc_kernels as ak

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = ("forward", "backward", "both")
RESULTS = Path(__file__).resolve().parent / "results.csv"
OURS = "arc_kernels"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of one implementation."""

    kernel: str
    shape: str
    mode: str
    implementation: str
    ms: float
    times_ours: float
    """Its time over ours in the same mode: above 1 ours is faster."""

    gb_per_s: float | str
    """Bytes of the floor over the time, 10^9 a second; empty for kernels bound by arithmetic."""

    share_of_copy: float | str
    tflops: float | str
    peak_extra_mib: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 1 where a case is wrong."""
    arguments = _parser().parse_args(argv)
    scale = TINY if arguments.check else QUICK if arguments.quick else FULL
    every = [*cases(scale), *attention_cases(scale)]
    known = sorted({case.kernel for case in every})
    if unknown := sorted(set(arguments.kernel) - set(known)):
        print(f"no kernel is called {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [case for case in every if not arguments.kernel or case.kernel in arguments.kernel]
    if arguments.check:
        return _check(chosen)
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return 0
    return _measure(chosen, arguments.csv)


def _check(chosen: list[Case]) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("no GPU: set TRITON_INTERPRET=1 to check the kernels under Triton's interpreter", file=sys.stderr)
        return 2
    wrong = 0
    for case in chosen:
        findings = check_case(case, device)
        wrong += bool(findings)
        print(f"{case.kernel} {case.shape}: {'; '.join(findings) or 'right'}", flush=True)
    return 1 if wrong else 0


def _measure(chosen: list[Case], path: Path) -> int:
    device = torch.device("cuda")
    copied = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: copies {copied / 1e9:.0f} GB/s (read and written)")
    wrong = 0
    for case in chosen:
        print(f"\n{case.kernel} {case.shape}", flush=True)
        try:
            findings = check_case(case, device)
        except torch.OutOfMemoryError:
            print("  not timed: the reference, which it is compared with, does not fit this GPU; try --quick")
            continue
        if findings:
            wrong += 1
            print(f"  not timed, results are wrong: {'; '.join(findings)}")
            continue
        rows = _time_case(case, device, copied)
        _append(path, rows)
        torch.compiler.reset()  # or the variants of earlier cases would count against its limit of recompilations
        torch.cuda.empty_cache()
    return 1 if wrong else 0


def _time_case(case: Case, device: torch.device, copied: float) -> list[Row]:
    """Measures ours and then the others; one that cannot run is named and left out."""
    from triton.errors import TritonError

    rows: list[Row] = []
    ours: dict[Mode, float] = {}
    print(_line("", "mode", "ms", "x ours", "GB/s", "of copy", "TFLOP/s", "MiB"))
    for name, function in _implementations(case):
        inputs = _leaves(case, device)
        try:
            if name != OURS and not same_result(function(**inputs), _ours(case)(**inputs)):
                print(f"  {name}: left out, it computes something else")
                continue
            for mode in MODES:
                run = _runner(function, inputs, case.wants_grad, mode)
                ms = median_ms(run)
                if name == OURS:
                    ours[mode] = ms
                rows.append(_row(case, mode, name, ms, ours[mode], copied, peak_extra_bytes(run)))
                print(_table_line(rows[-1]), flush=True)
        except (RuntimeError, ValueError, TypeError, ImportError, TritonError) as error:  # of others' libraries
            if name == OURS:
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"  {name}: left out, {type(error).__name__}: {reason[:120]}")
    return rows


def _implementations(case: Case) -> Iterator[tuple[str, Function]]:
    yield OURS, _ours(case)
    eager = case.eager or case.function
    yield "torch eager", _under("reference", eager)
    # Compiled for these very shapes, which is the best case for it.
    yield "torch.compile", _under("reference", torch.compile(eager, dynamic=False))
    yield from case.baselines.items()


def _ours(case: Case) -> Function:
    return _under("triton", case.function)


def _under(choice: Literal["triton", "reference"], function: Function) -> Function:
    def chosen(**inputs: Tensor) -> Any:
        with ak.use(choice):
            return function(**inputs)

    return chosen


def _leaves(case: Case, device: torch.device) -> dict[str, Tensor]:
    return {name: x.requires_grad_(name in case.wants_grad) for name, x in case.inputs(device).items()}


def _runner(
    function: Function, inputs: dict[str, Tensor], wants_grad: tuple[str, ...], mode: Mode
) -> Callable[[], Any]:
    """What is timed: forward keeps what backward needs; backward runs over a kept graph."""
    leaves = [inputs[name] for name in wants_grad]

    def forward() -> tuple[Tensor, ...]:
        result = function(**inputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    if mode == "forward":
        return forward
    seeds = [torch.randn_like(output) for output in forward()]
    if mode == "both":
        return lambda: torch.autograd.grad(forward(), leaves, seeds)
    outputs = forward()
    return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)


def _row(case: Case, mode: Mode, name: str, ms: float, ours_ms: float, copied: float, extra_bytes: int) -> Row:
    floor = case.floor
    floor_bytes = {"forward": floor.forward_bytes, "backward": floor.backward_bytes}
    floor_flops = {"forward": floor.forward_flops, "backward": floor.backward_flops}
    num_bytes = floor_bytes[mode] if mode != "both" else sum(floor_bytes.values())
    flops = floor_flops[mode] if mode != "both" else sum(floor_flops.values())
    is_matrix = flops > 0
    rate = num_bytes / (ms * 1e-3)
    return Row(
        kernel=case.kernel,
        shape=case.shape,
        mode=mode,
        implementation=name,
        ms=round(ms, 5),
        times_ours=round(ms / ours_ms, 3),
        gb_per_s="" if is_matrix else round(rate / 1e9, 1),
        share_of_copy="" if is_matrix else round(rate / copied, 3),
        tflops=round(flops / (ms * 1e-3) / 1e12, 1) if is_matrix else "",
        peak_extra_mib=round(extra_bytes / 2**20, 1),
    )


def _append(path: Path, rows: list[Row]) -> None:
    import triton

    stamp = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "command": shlex.join(["kernels/benchmarks/bench_kernels.py", *sys.argv[1:]]),
    }
    lines = [stamp | asdict(row) for row in rows]
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


def _table_line(row: Row) -> str:
    return _line(
        row.implementation,
        row.mode,
        f"{row.ms:.4f}",
        f"{row.times_ours:.2f}",
        row.gb_per_s,
        f"{row.share_of_copy:.0%}" if isinstance(row.share_of_copy, float) else "",
        row.tflops,
        row.peak_extra_mib,
    )


def _line(name: str, mode: str, *figures: object) -> str:
    return f"  {name:<24} {mode:<9}" + "".join(f"{figure!s:>10}" for figure in figures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time the Triton kernels on a GPU; see the file's docstring.")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only these, such as swiglu attention")
    parser.add_argument("--quick", action="store_true", help="fewer rows and shorter segments")
    parser.add_argument("--check", action="store_true", help="small cases, compared with the reference, not timed")
    parser.add_argument("--csv", type=Path, default=RESULTS, metavar="FILE", help="where rows are appended")
    return parser


if __name__ == "__main__":
    sys.exit(main())
