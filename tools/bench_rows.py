"""Machine, commit and CSV rows of a measurement, for the benchmark programs."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import arc_ds


def machine() -> str:
    """Name of the processor, and the number of cores of this process."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """Git commit of this checkout; the version of arc_ds outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return arc_ds.__version__


def append(path: Path, rows: Sequence[Any]) -> None:
    """Append rows, instances of one dataclass, to a CSV file. A new file starts with a header."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
