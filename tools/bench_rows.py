"""Origin, memory and CSV rows of a measurement, for the benchmark programs."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

import arc_ds
from arc_ds.system.device import describe_device


def origin(packages: Sequence[str]) -> dict[str, str]:
    """Machine, date, commit and versions of a row, by its field. Outside a checkout the commit is arc_ds's version."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = arc_ds.__version__
    versions = {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}
    return {
        "machine": describe_device(torch.device("cpu")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
    }


def reset_peak_memory() -> None:
    """Let VmHWM start again. Linux only. `ru_maxrss` would include the parent's peak from before the start."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(key: str) -> int:
    """Resident set size of this process: VmRSS now, VmHWM the highest since the last reset. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def megabytes_of(folder: Path) -> float:
    """Size of all files in a folder, in megabytes (10^6 bytes)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def write(file: TextIO, rows: Sequence[Any], *, header: bool) -> None:
    """Write rows, instances of one dataclass, as CSV."""
    writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
    if header:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


def append(path: Path, rows: Sequence[Any]) -> None:
    """Append rows to a CSV file. A new file starts with a header."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        write(file, rows, header=is_new)
