"""The version of the kernels that a measurement used."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

COMMIT_VARIABLE = "ARC_DS_COMMIT"
"""Environment variable with the result of `commit`, for a copy of the files without the `.git` folder."""

_HERE = Path(__file__).resolve().parent


def commit() -> str:
    """The commit of this checkout, with "-changed" if the kernels differ from it; "unknown" outside a checkout.

    COMMIT_VARIABLE overrides it.
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "../arc_kernels")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-changed" if changed else head


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(_HERE), *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()
