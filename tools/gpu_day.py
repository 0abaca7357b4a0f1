"""All measurements that need a GPU, by one command: `make gpu-day`, or on a bare machine

    PYTHONPATH=.:kernels python3 tools/gpu_day.py [--out FOLDER] [--stages NAME,NAME] [--minutes M] [--wheels FOLDER]
    TRITON_INTERPRET=1 python3 tools/gpu_day.py --rehearse      # every stage at toy size, on the CPU

The stages, ordered by worth: "environment" (machine, versions, ceilings), "right" (are the kernels right), "step" (the
paper's step: time, MFU, and where the time goes), "fast" (each kernel against the alternatives), "program" (`arc-ds
train`, stopped and resumed). Each is a process with a time budget and writes every row as soon as it is measured, so a
run that is cut off keeps what is done. Rows go to FOLDER/<gpu>.csv, the summary to FOLDER/<gpu>.md, tracebacks to
FOLDER/tracebacks.txt, all output to FOLDER/gpu_day.log. FOLDER is kernels/benchmarks/measured by default.

Exit code: 0 if all went well, 1 if something failed or is wrong, 2 without a GPU. tools/gpu_day.md says how to prepare
and run it on a machine without network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A bare machine has no package of ours installed.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "kernels" / "benchmarks"), str(ROOT / "tools")]

import torch  # noqa: E402
from gpu_stages.context import TRACEBACKS, StageContext, rows_path  # noqa: E402
from gpu_stages.summary import drop_stages, read_rows, summarize  # noqa: E402
from rows import MEASURED  # noqa: E402

BUDGETS_S = {"environment": 25, "right": 145, "step": 130, "fast": 140, "program": 100}
"""540 s together; a stage also gets what those before it have left over."""

README = ROOT / "kernels" / "README.md"
MEASURED_HEADING = "## Measured\n"
NOT_MEASURED = """\
Not measured yet, for lack of a GPU. Nothing above shows how fast the kernels are, or that they compute the same on a
GPU as under the interpreter. `make gpu-day` measures both and writes this section (`tools/gpu_day.md`).
"""

BAD_WORDS = ("failed", "wrong", "different", "ended early")
GRACE_S = 10.0
"""Time that a stage may use after its deadline to finish work in progress."""


@dataclass(frozen=True, kw_only=True)
class Day:
    """The options of one run.

    stages: their names, in order.
    minutes: for all of them together.
    rehearse: whether everything is of toy size, on the CPU.
    out: the folder of the results.
    """

    stages: tuple[str, ...]
    minutes: float
    rehearse: bool
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.run_stage:
        return run_stage(arguments.run_stage, arguments.rehearse, arguments.out, arguments.seconds)
    if arguments.readme:
        README.write_text(with_measured(README.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if unknown := [name for name in arguments.stages.split(",") if name not in BUDGETS_S]:
        print(f"no stage is called {', '.join(unknown)}; there are {', '.join(BUDGETS_S)}", file=sys.stderr)
        return 2
    if not arguments.rehearse and not torch.cuda.is_available():
        return _without_gpu()
    day = Day(
        stages=tuple(name for name in BUDGETS_S if name in arguments.stages.split(",")),
        minutes=arguments.minutes,
        rehearse=arguments.rehearse,
        out=arguments.out or (ROOT / "runs" / "gpu_day_rehearsal" if arguments.rehearse else MEASURED),
    )
    with tempfile.TemporaryDirectory(prefix="gpu_day_wheels_") as site:
        return run_day(day, _unpack_wheels(arguments.wheels, Path(site)))


def run_day(day: Day, site: Path | None) -> int:
    """Run the stages one after the other, each in a process, and write the summary after each.

    site: a folder with the packages of the carried wheels; None without any.
    """
    day.out.mkdir(parents=True, exist_ok=True)
    rows_file = rows_path(day.out)
    drop_stages(rows_file, day.stages)
    (day.out / TRACEBACKS).unlink(missing_ok=True)
    scale = 60 * day.minutes / sum(BUDGETS_S[name] for name in day.stages)
    budget_s, ends = 0.0, time.monotonic() + 60 * day.minutes
    for name in day.stages:
        budget_s += scale * BUDGETS_S[name]
        started = time.monotonic()
        _run_process(day, name, min(budget_s, ends - started), site)
        budget_s -= time.monotonic() - started
        rows_file.with_suffix(".md").write_text(summarize(read_rows(rows_file)), encoding="utf-8")
    print(rows_file.with_suffix(".md").read_text(encoding="utf-8"))
    bad = [row for row in read_rows(rows_file) if row["stage"] in day.stages and is_bad(row["value"])]
    for row in bad:
        print(f"{row['stage']}: {row['subject']} {row['case']} {row['variant']}: {row['value']}: {row['note']}")
    print(f"rows and summary are in {day.out}")
    return 1 if bad else 0


def run_stage(name: str, rehearse: bool, out: Path, seconds: float) -> int:
    """Run one stage in this process; an exception becomes a row and a traceback in a file. Returns 0 in both cases."""
    context = StageContext.of(name, rehearse=rehearse, out=out, seconds=seconds)
    try:
        import_module(f"gpu_stages.{name}").run(context)
    except Exception as error:
        context.failure("stage", error)
    return 0


def with_measured(text: str) -> str:
    """The text of kernels/README.md with the summaries of the measured GPUs as its last section."""
    before, heading, _ = text.partition(MEASURED_HEADING)
    if not heading:
        raise ValueError(f"{README} has no section {MEASURED_HEADING.strip()!r}; add it at its end")
    summaries = [path.read_text(encoding="utf-8") for path in sorted(MEASURED.glob("*.md"))]
    return f"{before}{heading}\n" + ("\n".join(summaries) or NOT_MEASURED)


def is_bad(word: str) -> bool:
    """Whether the value of a row says that something is wrong."""
    return any(bad in word for bad in BAD_WORDS)


def _run_process(day: Day, name: str, seconds: float, site: Path | None) -> None:
    """Run one stage, with its output in the log. A process that dies or hangs leaves a row that says so."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run-stage", name, "--out", str(day.out)]
    command += [f"--seconds={max(seconds, 1.0):.1f}", *(["--rehearse"] if day.rehearse else [])]
    print(f"== {name}, {seconds:.0f} s", flush=True)
    started = time.monotonic()
    log = day.out / "gpu_day.log"
    with log.open("a", encoding="utf-8") as words:
        words.write(f"== {name}\n")
        words.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(site, rehearse=day.rehearse),
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(seconds, 1.0) + GRACE_S)
            why = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = "the time was up"
        finally:
            _kill_session(process)
    print(f"   {name} took {time.monotonic() - started:.0f} s", flush=True)
    if why:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        context = StageContext.of(name, rehearse=day.rehearse, out=day.out, seconds=0.0)
        context.result("stage", "ended early", f"{why}; {last}")


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """End the stage and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
        process.wait()


def _environment(site: Path | None = None, *, rehearse: bool = False) -> dict[str, str]:
    path = [site, ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")]
    python_path = os.pathsep.join(str(folder) for folder in path if folder)
    simulated = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if rehearse else {}
    return {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **simulated}


def _unpack_wheels(folder: Path | None, site: Path) -> Path | None:
    """Install the wheels of a folder into `site`, without network and without their dependencies."""
    wheels = sorted(folder.glob("*.whl")) if folder and folder.is_dir() else []
    if not wheels:
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    result = subprocess.run([*command, "--target", str(site), *map(str, wheels)], check=False)
    if result.returncode:
        print(f"the wheels in {folder} could not be installed; going on without them", file=sys.stderr)
        return None
    return site


def _without_gpu() -> int:
    """Say so, and print the roofline, which needs none."""
    print("No GPU: torch sees none, so nothing can be measured here. The roofline needs none:\n", flush=True)
    subprocess.run([sys.executable, str(ROOT / "tools" / "roofline.py")], cwd=ROOT, env=_environment(), check=False)
    print("\nNo GPU: nothing was measured. `--rehearse` runs every stage at toy size on the CPU.", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure everything that a GPU can tell; see the file's docstring.")
    parser.add_argument("--stages", default=",".join(BUDGETS_S), metavar="NAME,NAME", help="which (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together (default: 9)")
    parser.add_argument("--rehearse", action="store_true", help="every stage at toy size, on the CPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels", metavar="FOLDER", help="packages to use")
    parser.add_argument("--readme", action="store_true", help="only put the summaries into kernels/README.md")
    parser.add_argument("--run-stage", choices=BUDGETS_S, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
