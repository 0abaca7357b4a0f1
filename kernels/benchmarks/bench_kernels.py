"""Time the Triton kernels on a GPU against plain torch, torch.compile and the kernels of other libraries.

    python kernels/benchmarks/bench_kernels.py [--kernel NAME …] [--quick] [--csv FILE]
    python kernels/benchmarks/bench_kernels.py --check        # small cases, results only; any device

Each case is first compared with the reference: outputs and gradients may err at most twice as much as torch does in
bfloat16, both against float32. A case that fails is not timed, and the exit code is 1. Then forward, backward and both
together are timed: all implementations in turn, round after round, with the L2 cache overwritten before each call
(`gpu_timing.interleaved`). Floors are those of `gpu_cases`; the copy bandwidth and the matrix rate are measured in the
same run. Rows are appended to kernels/benchmarks/measured/. Without a GPU nothing is measured; under
TRITON_INTERPRET=1 `--check` runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_attention import attention_cases
from gpu_cases import FULL, QUICK, TINY, Case, Function, Scale, cases
from gpu_checks import as_tuple, check_case, same_result
from gpu_timing import MAX_ROUNDS, Ceilings, Timing, interleaved, measure_ceilings, peak_extra_bytes
from rows import MEASURED, Row, RowFile, file_name, machine_name
from torch import Tensor

import arc_kernels as ak

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = ("forward", "backward", "both")
STAGE = "fast"
OURS = "arc_kernels"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code is 1 if a case is wrong, and 2 if there is nothing to run."""
    arguments = _parser().parse_args(argv)
    every = all_cases(_scale(arguments))
    known = sorted({case.kernel for case in every})
    if unknown := sorted(set(arguments.kernel) - set(known)):
        print(f"no kernel is called {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [case for case in every if not arguments.kernel or case.kernel in arguments.kernel]
    chosen = [case for case in chosen if arguments.shape in (None, case.shape)]
    if not chosen:
        print(f"no case has the shape {arguments.shape!r}; the output names the shapes", file=sys.stderr)
        return 2
    if arguments.check:
        return _check(chosen, warms=arguments.warm)
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return 0
    return _measure(chosen, arguments.csv or MEASURED / f"{file_name(machine_name())}.csv")


def all_cases(scale: Scale) -> list[Case]:
    """All cases: the first of each kernel, then the second ones, and so on: a cut at the end leaves no kernel out."""
    every = [*attention_cases(scale), *cases(scale)]
    kernels = [case.kernel for case in every]
    order = sorted(range(len(every)), key=lambda i: kernels[:i].count(kernels[i]))
    return [every[i] for i in order]


def _scale(arguments: argparse.Namespace) -> Scale:
    if arguments.quick:
        return QUICK
    return TINY if arguments.check and not arguments.full else FULL


def _check(chosen: list[Case], *, warms: bool) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("no GPU: set TRITON_INTERPRET=1 to check the kernels under Triton's interpreter", file=sys.stderr)
        return 2
    wrong = 0
    for case in chosen:
        try:
            findings = check_case(case, device)
            verdict = f"wrong: {'; '.join(findings)}" if findings else "right"
        except torch.OutOfMemoryError:
            verdict = "not checked: the reference does not fit this GPU"
        except Exception as error:  # a kernel that does not compile must not hide the others
            traceback.print_exc()
            verdict = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        wrong += verdict.startswith(("wrong", "failed"))
        print(f"result: {case.kernel} {case.shape}: {verdict}", flush=True)
    if warms:
        for case in chosen:
            _warm(case, device)
    return 1 if wrong else 0


def _warm(case: Case, device: torch.device) -> None:
    """Run all implementations once, forward and backward, so that the compilers' caches hold them."""
    inputs = leaves_of(case, device)
    with _graphs_can_be_kept():
        for name, function in _implementations(case, compiles=True):
            reason = _cannot_run(lambda f=function: runner_of(f, inputs, case.wants_grad, "both")())
            print(f"warm: {case.kernel} {name} {reason}", flush=True)
    torch.compiler.reset()


def _measure(chosen: list[Case], path: Path) -> int:
    device = torch.device("cuda")
    ceilings = measure_ceilings(device)
    print(f"{machine_name()}: copies {ceilings.copy / 1e9:.0f} GB/s, products {ceilings.matrix / 1e12:.0f} TFLOP/s")
    file = RowFile(path, "kernels/benchmarks/bench_kernels.py")
    wrong = 0
    for case in chosen:
        print(f"\n{case.kernel} {case.shape}", flush=True)
        rows = measure_case(case, device, ceilings)
        file.append(rows)
        wrong += any(row.value == "wrong" for row in rows)
    return 1 if wrong else 0


def measure_case(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    *,
    compiles: bool = True,
    max_rounds: int = MAX_ROUNDS,
) -> list[Row]:
    """Check one case, then time our kernel and the others. If one cannot run, its row gives the reason.

    case: the kernel and its shape.
    device: device to run on.
    ceilings: ceilings of the device, from which the shares are computed.
    compiles: whether the others include torch.compile.
    max_rounds: see `gpu_timing.interleaved`.
    """
    try:
        findings = check_case(case, device)
    except torch.OutOfMemoryError:
        return [_word(case, OURS, "not timed", "the reference does not fit this GPU; try --quick")]
    if findings:
        return [_word(case, OURS, "wrong", "; ".join(findings))]
    with _graphs_can_be_kept():
        rows = _time_case(case, device, ceilings, compiles=compiles, max_rounds=max_rounds)
    torch.compiler.reset()  # or the variants of earlier cases would count against its limit of recompilations
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _time_case(case: Case, device: torch.device, ceilings: Ceilings, *, compiles: bool, max_rounds: int) -> list[Row]:
    """The rows of a case that is right."""
    rows: list[Row] = []
    # Each has inputs of its own: Liger's SwiGLU writes the gradients over them.
    fit: dict[str, tuple[Function, dict[str, Tensor]]] = {}
    ours = as_tuple(_ours(case)(**leaves_of(case, device)))
    for name, function in _implementations(case, compiles=compiles):
        inputs = leaves_of(case, device)
        reason = "" if name == OURS else _unfit(function, inputs, ours)
        if reason:
            rows.append(_word(case, name, "left out", reason))
        else:
            fit[name] = function, inputs
    for mode in MODES:
        runners = {}
        for name, (function, inputs) in fit.items():
            runner = runner_of(function, inputs, case.wants_grad, mode)
            reason = "" if name == OURS else _cannot_run(runner)
            if reason:
                rows.append(_word(case, name, "left out", f"{mode}: {reason}"))
            else:
                runners[name] = runner
        rows += _time_mode(case, mode, runners, device, ceilings, max_rounds)
    return rows


@contextmanager
def _graphs_can_be_kept() -> Iterator[None]:
    """Keep compiled backwards from reusing the memory of saved tensors ("donated buffers").

    One that reuses it, such as one in the cache after `_warm`, refuses a retained graph. Timing backward alone retains
    the graph.
    """
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def _time_mode(
    case: Case,
    mode: Mode,
    runners: dict[str, Callable[[], Any]],
    device: torch.device,
    ceilings: Ceilings,
    max_rounds: int,
) -> list[Row]:
    rows = []
    timings = dict(zip(runners, interleaved(list(runners.values()), device, max_rounds=max_rounds), strict=True))
    print(_line("", "mode", "ms", "±", "x ours", "of ceiling", "MiB"))
    for name, runner in runners.items():
        extra_bytes = peak_extra_bytes(runner) if device.type == "cuda" else 0
        row = _row(case, mode, name, timings[name], timings[OURS].median_ms, ceilings, extra_bytes)
        print(_line(name, mode, row.value, row.spread, row.ratio, row.share, f"{extra_bytes / 2**20:.1f}"), flush=True)
        rows.append(row)
    return rows


def _unfit(function: Function, inputs: dict[str, Tensor], ours: tuple[Tensor, ...]) -> str:
    """The reason why another implementation is left out; nothing if it computes the same as ours."""
    results: list[Any] = []
    reason = _cannot_run(lambda: results.append(function(**inputs)))
    return reason or ("" if same_result(results[0], ours) else "it computes something else")


def _cannot_run(run: Callable[[], Any]) -> str:
    """The error of a call, in one line; empty if it runs. A GPU error may appear only after synchronisation."""
    try:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # from any library: report it as a row and continue with the others
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _implementations(case: Case, *, compiles: bool) -> Iterator[tuple[str, Function]]:
    yield OURS, _ours(case)
    eager = case.eager or case.function
    yield "torch eager", _under("reference", eager)
    if compiles and case.is_compiled:
        # Compiled for these very shapes, which is the best case for it.
        yield "torch.compile", _under("reference", torch.compile(eager, dynamic=False))
    for name, function in case.baselines.items():
        if compiles or name not in case.compiled_baselines:
            yield name, function


def _ours(case: Case) -> Function:
    return _under("triton", case.function)


def _under(choice: Literal["triton", "reference"], function: Function) -> Function:
    def chosen(**inputs: Tensor) -> Any:
        with ak.use(choice):
            return function(**inputs)

    return chosen


def leaves_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The inputs of a case; those of `wants_grad` require gradients."""
    return {name: x.requires_grad_(name in case.wants_grad) for name, x in case.inputs(device).items()}


def runner_of(
    function: Function, inputs: dict[str, Tensor], wants_grad: tuple[str, ...], mode: Mode
) -> Callable[[], Any]:
    """The call that is timed. "forward" saves what backward needs; "backward" runs on a retained graph."""
    leaves = [inputs[name] for name in wants_grad]

    def forward() -> tuple[Tensor, ...]:
        return as_tuple(function(**inputs))

    if mode == "forward":
        return forward
    seeds = [torch.randn_like(output) for output in forward()]
    if mode == "both":
        return lambda: torch.autograd.grad(forward(), leaves, seeds)
    outputs = forward()
    return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)


def _row(
    case: Case, mode: Mode, name: str, timing: Timing, ours_ms: float, ceilings: Ceilings, extra_bytes: int
) -> Row:
    floor = case.floor
    num_bytes = {"forward": floor.forward_bytes, "backward": floor.backward_bytes}
    flops = {"forward": floor.forward_flops, "backward": floor.backward_flops}
    work, ceiling = (flops, ceilings.matrix) if any(flops.values()) else (num_bytes, ceilings.copy)
    total = sum(work.values()) if mode == "both" else work[mode]
    rate = total / (timing.median_ms * 1e-3)
    unit = "TFLOP/s" if work is flops else "GB/s"
    rate_in_unit = rate / (1e12 if work is flops else 1e9)
    return Row(
        stage=STAGE,
        subject=case.kernel,
        case=case.shape,
        variant=name,
        metric=mode,
        value=round(timing.median_ms, 5),
        unit="ms",
        spread=round(timing.spread_ms, 5),
        ratio=round(timing.median_ms / ours_ms, 3),
        share=round(rate / ceiling, 3),
        note=f"{rate_in_unit:.1f} {unit}; {timing.rounds} rounds; peak {extra_bytes / 2**20:.1f} MiB",
    )


def _word(case: Case, name: str, word: str, note: str) -> Row:
    print(f"  {name}: {word}: {note}", flush=True)
    return Row(stage=STAGE, subject=case.kernel, case=case.shape, variant=name, metric="result", value=word, note=note)


def _line(name: str, mode: str, *figures: object) -> str:
    return f"  {name:<24} {mode:<9}" + "".join(f"{figure!s:>12}" for figure in figures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time the Triton kernels on a GPU; see the file's docstring.")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only these, such as swiglu attention")
    parser.add_argument("--shape", metavar="TEXT", help="only the cases of this shape, as the output names it")
    parser.add_argument("--quick", action="store_true", help="fewer rows and shorter segments")
    parser.add_argument("--check", action="store_true", help="small cases, compared with the reference, not timed")
    parser.add_argument("--full", action="store_true", help="with --check: cases as large as the timed ones")
    parser.add_argument("--warm", action="store_true", help="with --check: then run all implementations once")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where rows are appended")
    return parser


if __name__ == "__main__":
    sys.exit(main())
