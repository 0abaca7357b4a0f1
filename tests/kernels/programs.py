"""The programs of `kernels/benchmarks`: as modules, and as processes without Triton's interpreter.

The test session enables the interpreter, so compilation needs a separate process.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.waiting import LIMIT_S

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """A module of the benchmarks. Skips the test, or the file that calls this on import, if triton is not installed."""
    pytest.importorskip("triton")
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


def run_python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python with the given arguments and capture its output. It can import `arc_kernels` and the benchmarks.

    interpret: set TRITON_INTERPRET=1; otherwise it is unset.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False
    )
