"""Stage "right": are the kernels right? Runs one process per kernel and, at the same time, the tests in parallel.

These processes compare each kernel with the reference at the paper's shapes. Then they run its alternatives, so that
the compilers' caches are full before the stage "fast" times anything. A kernel with an alternative that takes long to
compile has one process for each shape.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench_kernels import all_cases
from gpu_cases import FULL, TINY

from gpu_stages.context import ROOT, TRACEBACKS, StageContext, one_line

BENCH = ROOT / "kernels" / "benchmarks" / "bench_kernels.py"
TEST_LOG, TEST_WORDS = "tests.jsonl", "tests.log"
MAX_TEST_PROCESSES = 8
# Tests that launch nothing on a GPU: they compile for chips that are not there, or start the interpreter.
WITHOUT_GPU = ("test_offline_compile", "test_dry_launch", "test_bench_kernels", "test_chosen_in_a_run")
# In a rehearsal: the quick tests of one kernel, enough to show that results arrive.
REHEARSED = ("tests/kernels/test_triton_swiglu.py",)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """A process that checks one kernel.

    kernel: its name; "all" for all kernels.
    num_cases: number of expected verdicts.
    process: with `words`, the file of its output.
    """

    kernel: str
    num_cases: int
    process: subprocess.Popen[bytes]
    words: Path


def run(context: StageContext) -> None:
    """Append one row for each case of each kernel, and one for each file of tests."""
    # Not among the results: a stage that is killed would leave two dozen files there.
    with tempfile.TemporaryDirectory(prefix="gpu_day_right_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        checks = list(_start_checks(context, folder))
        tests = _start_tests(context, folder)
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
        _report_tests(context, folder, tests.returncode)


def _start_checks(context: StageContext, folder: Path) -> Iterator[_Check]:
    """One process for each kernel, or for each case of a kernel that has alternatives which are compiled."""
    if context.rehearse:  # one process: it would import torch a dozen times on two cores
        yield _start_check(folder, "all", len(all_cases(TINY)), "--check")
        return
    options = ("--check", "--full", "--warm", "--kernel")
    cases = all_cases(FULL)
    for kernel in sorted({case.kernel for case in cases}):
        of_kernel = [case for case in cases if case.kernel == kernel]
        if any(case.compiled_baselines for case in of_kernel):
            for case in of_kernel:
                yield _start_check(folder, kernel, 1, *options, kernel, "--shape", case.shape)
        else:
            yield _start_check(folder, kernel, len(of_kernel), *options, kernel)


def _start_check(folder: Path, kernel: str, num_cases: int, *options: str) -> _Check:
    handle, words = tempfile.mkstemp(prefix=f"check_{kernel}_", suffix=".log", dir=folder)
    # Two dozen processes share the cores: without pools of compiling processes of their own.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with os.fdopen(handle, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(BENCH), *options], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    return _Check(kernel=kernel, num_cases=num_cases, process=process, words=Path(words))


def _start_tests(context: StageContext, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_stages.report_plugin"]
    command += ["--test-log", str(folder / TEST_LOG), "--continue-on-collection-errors"]
    if not context.rehearse and find_spec("xdist"):
        num_processes = min(MAX_TEST_PROCESSES, max(1, len(os.sched_getaffinity(0)) // 2))
        command += ["--numprocesses", str(num_processes), "--dist", "worksteal", "--max-worker-restart", "50"]
    files = sorted(path for path in (ROOT / "tests" / "kernels").glob("test_*.py") if path.stem not in WITHOUT_GPU)
    command += ["-p", "no:cacheprovider", *(REHEARSED if context.rehearse else map(str, files))]
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with (folder / TEST_WORDS).open("wb") as words:
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
    if check.process.returncode not in (0, 1) or len(found) < check.num_cases:
        cause = "the time was up" if check.process.returncode == -9 else f"exit code {check.process.returncode}"
        last = text.strip().splitlines()[-1:] or [""]
        # After the verdicts it only fills caches.
        word = "ended early" if len(found) < check.num_cases else "not all compiled"
        context.result(check.kernel, word, f"{cause}: {last[0]}", variant="check")
    if any("Traceback" in line for line in text.splitlines()):
        with (context.out / TRACEBACKS).open("a", encoding="utf-8") as file:
            file.write(f"== right: check of {check.kernel}\n{text}\n")


def _read_entries(log: Path) -> list[dict[str, str]]:
    """The plugin's entries, one per test. A test that kills its worker is reported twice; the failure counts.

    The last line may be incomplete.
    """
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    by_test: dict[str, dict[str, str]] = {}
    for entry in entries:
        before = by_test.get(entry["test"])
        if before is None or before["outcome"] != "failed":
            by_test[entry["test"]] = entry
    return list(by_test.values())


def _report_tests(context: StageContext, folder: Path, code: int | None) -> None:
    entries = _read_entries(folder / TEST_LOG)
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
        words = (folder / TEST_WORDS).read_text(encoding="utf-8", errors="replace").strip()
        context.result("tests", "ended early", f"{why}; {one_line(words[-200:])}", variant="tests")
