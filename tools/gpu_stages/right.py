"""Stage "right": are the kernels right? First one process for each kernel, then the tests, many at a time.

The first processes compare each kernel with the reference at the paper's shapes, and then run what it will be timed
against, so that the compilers' caches are full before anything is timed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench_kernels import all_cases
from gpu_cases import TINY

from gpu_stages.context import ROOT, TRACEBACKS, StageContext, one_line

BENCH = ROOT / "kernels" / "benchmarks" / "bench_kernels.py"
MAX_TEST_PROCESSES = 8
# Tests that launch nothing on a GPU: they compile for chips that are not there, or start the interpreter.
WITHOUT_GPU = ("test_offline_compile", "test_dry_launch", "test_bench_kernels", "test_chosen_in_a_run")
# In a rehearsal: the quick tests of one kernel, enough to show that results arrive.
REHEARSED = ("tests/kernels/test_triton_swiglu.py",)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """A process that checks one kernel, and the file of its words."""

    kernel: str
    process: subprocess.Popen[bytes]
    words: Path


def run(context: StageContext) -> None:
    """Append one row for each case of each kernel, and one for each file of tests."""
    checks = [] if context.rehearse else list(_start_checks(context))
    if context.rehearse:  # one process: it would import torch a dozen times on two cores
        checks = [_start_check(context, None)]
    log = context.out / "tests.jsonl"
    log.unlink(missing_ok=True)
    tests = _start_tests(context, log)
    try:
        for check in checks:
            _wait(check.process, context.deadline)
            _report_check(context, check)
        _wait(tests, context.deadline)
    finally:
        for process in (tests, *(check.process for check in checks)):
            if process.poll() is None:
                process.kill()
                process.wait()
    _report_tests(context, log, tests.returncode)


def _start_checks(context: StageContext) -> Iterator[_Check]:
    for kernel in sorted({case.kernel for case in all_cases(TINY)}):
        yield _start_check(context, kernel)


def _start_check(context: StageContext, kernel: str | None) -> _Check:
    words = context.out / f"check_{kernel or 'all'}.log"
    options = ["--check"] if context.rehearse else ["--check", "--full", "--warm"]
    options += ["--kernel", kernel] if kernel else []
    with words.open("wb") as file:
        process = subprocess.Popen([sys.executable, str(BENCH), *options], stdout=file, stderr=subprocess.STDOUT)
    return _Check(kernel=kernel or "all", process=process, words=words)


def _start_tests(context: StageContext, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_stages.report_plugin", "--test-log", str(log)]
    if not context.rehearse and find_spec("xdist"):
        num_processes = min(MAX_TEST_PROCESSES, max(1, len(os.sched_getaffinity(0)) // 2))
        command += ["--numprocesses", str(num_processes), "--dist", "worksteal", "--max-worker-restart", "50"]
    files = sorted(path for path in (ROOT / "tests" / "kernels").glob("test_*.py") if path.stem not in WITHOUT_GPU)
    command += ["-p", "no:cacheprovider", *(REHEARSED if context.rehearse else map(str, files))]
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with (context.out / "tests.log").open("wb") as words:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=words, stderr=subprocess.STDOUT
        )


def _wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Until it ends or the time is up."""
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _report_check(context: StageContext, check: _Check) -> None:
    """One row for each line `kernel shape: right` or `kernel shape: findings`; one if the process died."""
    text = check.words.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^result: (\w+) (.*?): (right|(?:wrong|failed|not checked): .*)$", text, re.MULTILINE)
    for kernel, shape, verdict in found:
        word, _, note = verdict.partition(": ")
        context.result(kernel, word, note, case=shape, variant="check")
    if check.process.returncode not in (0, 1):
        cause = "the time was up" if check.process.returncode == -9 else f"exit code {check.process.returncode}"
        last = text.strip().splitlines()[-1:] or [""]
        context.result(check.kernel, "ended early", f"{cause}: {last[0]}", variant="check")
    if any("Traceback" in line for line in text.splitlines()):
        with (context.out / TRACEBACKS).open("a", encoding="utf-8") as file:
            file.write(f"== right: check of {check.kernel}\n{text}\n")
    check.words.unlink()


def _report_tests(context: StageContext, log: Path, code: int | None) -> None:
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    failures: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        file, _, test = entry["test"].partition("::")
        subject = Path(file).stem.removeprefix("test_")
        outcomes[subject][entry["outcome"]] += 1
        if entry["outcome"] == "failed":
            failures[subject].append(test)
            with (context.out / TRACEBACKS).open("a", encoding="utf-8") as words:
                words.write(f"== right: {entry['test']}\n{entry['words']}\n\n")
    for subject, counts in sorted(outcomes.items()):
        value = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if counts[name])
        context.result(subject, value, ", ".join(failures[subject]), variant="tests")
    if code not in (0, 1):
        why = "the time was up" if code == -9 else f"pytest ended with code {code}"
        words = (context.out / "tests.log").read_text(encoding="utf-8", errors="replace").strip()
        context.result("tests", "ended early", f"{why}; {one_line(words[-200:])}", variant="tests")
    for path in (log, context.out / "tests.log"):
        path.unlink(missing_ok=True)
