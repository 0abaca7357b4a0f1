"""Runs Python without Triton's interpreter, which the test session sets: what compiles needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


def run_python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Python with the given arguments, its output caught; `arc_kernels` and the benchmarks can be imported.

    interpret: sets TRITON_INTERPRET=1, which is unset otherwise.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
